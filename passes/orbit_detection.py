"""Annotate nodes with the orbits that they make and absorb."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.graph.passes import Pass
from fxprune.labels.detection import find_orbits

__all__ = ["OrbitDetection"]


@dataclass(frozen=True)
class OrbitDetection(Pass):
    """Write into `meta["orbits"]` what a dump shows behind `#`; the graph itself stays.

    Before: `%conv2 = conv2 Conv2d(64→64)(%relu) : f32[1, 64, 56, 56]`
    After: `%conv2 = conv2 Conv2d(64→64)(%relu) : f32[1, 64, 56, 56]  # makes orbit_1×64, absorbs orbit_0×64`

    `attention` is that of `mask-insertion`; by default that of the masks, "dimensions" where there are none.
    """

    name: ClassVar[str] = "orbit-detection"

    attention: str | None = None

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Annotate; nothing that computes is changed."""
        notes: dict[str, list[str]] = defaultdict(list)
        orbits = find_orbits(module, self.attention)
        for verb, places in (("makes", "producers"), ("absorbs", "absorbers")):
            for orbit in orbits:
                for node in getattr(orbit, places):
                    notes[node].append(f"{verb} {orbit.name}×{orbit.width}")
        for pinned in orbits.pinned:
            notes[pinned.reason.node].append(f"pins {pinned.parameter}[{pinned.dimension}]: {pinned.reason.text}")
        for node in module.graph.nodes:
            if node.name in notes:
                node.meta["orbits"] = ", ".join(notes[node.name])
        return False
