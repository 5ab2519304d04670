"""Write zeros into the masks, for a ratio, MACs or parameter target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxprune.errors import UsageError
from fxprune.gating.insertion import refuse_gates
from fxprune.graph.passes import Pass
from fxprune.importance import Criterion, Evidence, score_orbits
from fxprune.labels.detection import find_orbits
from fxprune.runtime.masks import has_masks
from fxprune.selection import Constraints, Target, choose

__all__ = ["ChannelSelection"]


@dataclass(frozen=True)
class ChannelSelection(Pass):
    """Zero the masks of the least important channels until the target is met.

    Before: `channel_masks.orbit_0 = [1, 1, 1, 1]`
    After: `channel_masks.orbit_0 = [1, 0, 0, 1]`; the graph itself stays.

    Options are those of `fxprune.selection.Target` and `Constraints`; `criterion` is a name of
    `fxprune.importance.CRITERIA` or a function; `scope` is "global" (the least important of all orbits) or "uniform"
    (the same fraction of each).
    """

    name: ClassVar[str] = "channel-selection"

    ratio: float | str | Mapping[str, float] | None = None
    macs: float | str | None = None
    parameters: float | str | None = None
    criterion: str | Criterion = "l2"
    scope: str = "global"
    round_to: int = 1
    min_width: int = 1
    max_ratio: float | str = 1.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_statistical: bool = False
    seed: int = 0
    evidence: Evidence | None = field(default=None, compare=False)

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Write the selection into the masks."""
        target = Target(self.ratio, self.macs, self.parameters)
        constraints = Constraints(
            self.round_to, self.min_width, self.max_ratio, self.include, self.exclude, self.allow_statistical
        )
        refuse_gates(module, self.name)
        if not has_masks(module):
            raise UsageError("the graph has no masks to select in; run mask-insertion before channel-selection")
        if self.evidence is not None:
            module.recompile()
        orbits = find_orbits(module)
        scores = score_orbits(module, orbits, self.criterion, self.seed, self.evidence)
        keep = choose(module, orbits, scores, target, constraints, self.scope)
        changed = False
        for orbit in orbits:
            if orbit.mask is not None:
                changed |= _write(module.get_buffer(orbit.mask), keep[orbit.classes])
        return changed


def _write(mask: Tensor, keep: Tensor) -> bool:
    """Zero `mask` where `keep` is zero; what was masked before stays masked."""
    before = mask.clone()
    mask.mul_(keep.to(mask))
    return not torch.equal(before, mask)
