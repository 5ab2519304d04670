"""A plan: which classes of every orbit and which weights stay, and what computes every layer.

It is data to save, edit by hand, compare and replay.

| module | what it holds |
| --- | --- |
| `plan` | the whole of it, and its JSON |
| `records` | its parts |
| `masks` | channel masks and weight masks of graphs, read and written |
"""

from __future__ import annotations

from fxprune.plan.masks import read_plan, read_weight_masks, write_masks, write_weight_masks
from fxprune.plan.plan import SCHEMA, Plan, keep_plan, load_plan, plan_of
from fxprune.plan.records import PlannedLowering, PlannedOrbit, PlannedWeight

__all__ = [
    "SCHEMA",
    "Plan",
    "PlannedLowering",
    "PlannedOrbit",
    "PlannedWeight",
    "keep_plan",
    "load_plan",
    "plan_of",
    "read_plan",
    "read_weight_masks",
    "write_masks",
    "write_weight_masks",
]
