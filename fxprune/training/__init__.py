"""The training loop that fine-tuning, learned thresholds and learned channels run on."""

from fxprune.training.distillation import Distillation, distill
from fxprune.training.divergences import DIVERGENCES
from fxprune.training.gradual import GradualSparsity
from fxprune.training.history import History, Record
from fxprune.training.hooks import Hook, Moment
from fxprune.training.learned_channels import LearnedChannels, frozen_batchnorm
from fxprune.training.learned_thresholds import LearnedThresholds, attach_thresholds, harden
from fxprune.training.loop import train
from fxprune.training.objectives import (
    classification,
    cross_entropy,
    mean_absolute_error,
    mean_squared_error,
    reconstruction,
)
from fxprune.training.options import Training
from fxprune.training.traces import Checkpoint, Trace

__all__ = [
    "DIVERGENCES",
    "Checkpoint",
    "Distillation",
    "GradualSparsity",
    "History",
    "Hook",
    "LearnedChannels",
    "LearnedThresholds",
    "Moment",
    "Record",
    "Trace",
    "Training",
    "attach_thresholds",
    "classification",
    "cross_entropy",
    "distill",
    "frozen_batchnorm",
    "harden",
    "mean_absolute_error",
    "mean_squared_error",
    "reconstruction",
    "train",
]
