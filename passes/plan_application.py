"""Write a saved plan into the masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.errors import UsageError
from fxprune.gating.insertion import refuse_gates
from fxprune.graph.passes import Pass
from fxprune.plan import Plan, load_plan, write_masks
from fxprune.runtime.masks import has_masks

__all__ = ["PlanApplication"]


@dataclass(frozen=True)
class PlanApplication(Pass):
    """Set the masks as a plan says; `plan` is a `Plan` or the path of a plan.json.

    Before: `channel_masks.orbit_0 = [1, 1, 1, 1]`
    After: `channel_masks.orbit_0 = [1, 0, 0, 1]`, where the plan keeps classes 0 and 3; the graph itself stays.
    """

    name: ClassVar[str] = "plan-application"

    plan: str | Plan = ""

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Write the masks."""
        refuse_gates(module, self.name)
        if not has_masks(module):
            raise UsageError(
                "the graph has no masks to write a plan into; run mask-insertion before plan-application; where that "
                "ran, no channels of this model can leave, and the plan is for another one"
            )
        write_masks(module, self.plan if isinstance(self.plan, Plan) else load_plan(self.plan))
        return True
