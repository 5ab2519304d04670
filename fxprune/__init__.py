"""fxprune: torch.fx graph-rewriting passes that make trained PyTorch models smaller and faster for real."""

from __future__ import annotations

from typing import Any

from fxprune.batchnorm import recalibrate_batchnorm
from fxprune.cost import Cost, CostModel
from fxprune.graph.dump import diff, dump
from fxprune.graph.inputs import Inputs
from fxprune.graph.passes import Pipeline, print_changes
from fxprune.graph.tracing import trace
from fxprune.insights.sensitivity import Sensitivity, sensitivity
from fxprune.labels.detection import find_orbits
from fxprune.labels.orbits import Orbit, Orbits
from fxprune.plan import Plan
from fxprune.report import Report
from fxprune.runtime.weight_masks import finalize

__all__ = [
    "Cost",
    "CostModel",
    "Inputs",
    "Learned",
    "Orbit",
    "Orbits",
    "Pipeline",
    "Plan",
    "Report",
    "Result",
    "Sensitivity",
    "apply_checkpoint",
    "apply_plan",
    "bench",
    "check_recipe",
    "diff",
    "dump",
    "finalize",
    "find_orbits",
    "learn_channels",
    "learn_thresholds",
    "load",
    "lower",
    "print_changes",
    "prune",
    "recalibrate_batchnorm",
    "run_passes",
    "run_recipe",
    "save",
    "sensitivity",
    "sparsify",
    "sparsify_gradually",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Import the façade on first use: it imports `passes`, which import this package."""
    if name in __all__:
        from fxprune import api

        return getattr(api, name)
    raise AttributeError(f"module 'fxprune' has no attribute '{name}'")
