"""The training loop that fine-tuning, learned thresholds and learned channels run on."""

from fxprune.training.history import History, Record
from fxprune.training.hooks import Hook, Moment
from fxprune.training.loop import train
from fxprune.training.objectives import classification, cross_entropy
from fxprune.training.options import Training

__all__ = ["History", "Hook", "Moment", "Record", "Training", "classification", "cross_entropy", "train"]
