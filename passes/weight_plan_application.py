"""Mask weights as a saved plan says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.graph.passes import Pass
from fxprune.plan import Plan, load_plan, write_weight_masks

__all__ = ["WeightPlanApplication"]


@dataclass(frozen=True)
class WeightPlanApplication(Pass):
    """Mask the weights that a plan makes sparse; `plan` is a `Plan` or the path of a plan.json.

    Before: `%conv1 = conv1 Conv2d(64→256)(%x)`
    After: `%conv1 = conv1 Conv2d(64→256, 75.0% sparse)(%x)`

    A plan that removes channels too holds the masks of what is left, so this pass comes after `channel-surgery`.
    """

    name: ClassVar[str] = "weight-plan-application"

    plan: str | Plan = ""

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Write the masks."""
        return write_weight_masks(module, self.plan if isinstance(self.plan, Plan) else load_plan(self.plan))
