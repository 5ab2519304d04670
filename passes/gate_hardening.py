"""Turn gates that have learned into masks of zeros and ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.gating.gates import Gates
from fxprune.gating.insertion import replace_gates
from fxprune.graph.passes import Pass
from fxprune.runtime.masks import gates_of
from fxprune.selection import read_amount

__all__ = ["GateHardening"]


@dataclass(frozen=True)
class GateHardening(Pass):
    """Replace every gate by the mask that it has learned; predictors leave without a trace (paper 001, §5.1).

    Before: `%orbit_0 = channel_masks.orbit_0 PredictedGate(4, keeps 2)(%conv1)`
    After: `%orbit_0 = get channel_masks.orbit_0 : keeps 2 of 4`

    By default a channel stays where its probability is above 0.5, which is what the gates are in evaluation. With
    `macs`, a share of the model's or a count, as many stay as fit, the most probable first: channels that the gates
    would keep may leave, and some that they gave up may stay.
    """

    name: ClassVar[str] = "gate-hardening"

    macs: float | str | None = None

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Harden; a graph without gates is left alone."""
        if not gates_of(module):
            return False
        if self.macs is None:
            return replace_gates(module)
        gates = Gates(module)
        return replace_gates(module, gates.within(read_amount(self.macs, "macs", gates.whole)))
