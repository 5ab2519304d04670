"""The façade: whole jobs in one call."""

from __future__ import annotations

from fxprune.api.channels import prune
from fxprune.api.replay import apply_plan, load, run_passes, save
from fxprune.api.results import Result
from fxprune.api.weights import sparsify

__all__ = ["Result", "apply_plan", "load", "prune", "run_passes", "save", "sparsify"]
