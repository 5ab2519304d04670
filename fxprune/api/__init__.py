"""The façade: whole jobs in one call."""

from __future__ import annotations

from fxprune.api.bench import bench
from fxprune.api.channels import prune
from fxprune.api.learning import Learned, learn_channels
from fxprune.api.lowering import lower
from fxprune.api.recipes import check_recipe, run_recipe
from fxprune.api.replay import apply_plan, load, run_passes, save
from fxprune.api.results import Result
from fxprune.api.training import apply_checkpoint, learn_thresholds, sparsify_gradually
from fxprune.api.weights import sparsify

__all__ = [
    "Learned",
    "Result",
    "apply_checkpoint",
    "apply_plan",
    "bench",
    "check_recipe",
    "learn_channels",
    "learn_thresholds",
    "load",
    "lower",
    "prune",
    "run_passes",
    "run_recipe",
    "save",
    "sparsify",
    "sparsify_gradually",
]
