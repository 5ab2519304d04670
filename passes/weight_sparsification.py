"""Mask the least important weights, single or in blocks, for a sparsity, MACs or parameter target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.graph.passes import Pass
from fxprune.sparsity.blocks import Block
from fxprune.sparsity.masks import SparseGraph
from fxprune.sparsity.selection import Sparsifier, WeightCriterion

__all__ = ["WeightSparsification"]


@dataclass(frozen=True)
class WeightSparsification(Pass):
    """Zero weights in a pattern that a kernel can skip; the graph itself stays (paper 000, §3).

    Before: `%conv1 = conv1 Conv2d(64→256)(%x)`
    After: `%conv1 = conv1 Conv2d(64→256, 75.0% sparse)(%x)`; its weight is parametrised by a mask, which training keeps

    Options are those of `fxprune.sparsity.selection.Sparsifier`. A mask that is there already is narrowed.
    """

    name: ClassVar[str] = "weight-sparsification"

    sparsity: float | str | Mapping[str, float] | None = None
    macs: float | str | None = None
    parameters: float | str | None = None
    block: str | tuple[int, int] = "1x4"
    scope: str = "global"
    layers: tuple[str, ...] = ("conv1x1",)
    exclude: tuple[str, ...] = ()
    criterion: str | WeightCriterion = "magnitude"
    max_sparsity: float | str = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", str(Block.of(self.block)))  # so that a pair of sizes has a spelling too

    @property
    def sparsifier(self) -> Sparsifier:
        """The options, checked."""
        return Sparsifier(
            self.sparsity,
            self.macs,
            self.parameters,
            Block.of(self.block),
            self.scope,
            self.layers,
            self.exclude,
            self.criterion,
            self.max_sparsity,
            self.seed,
        )

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Choose and write the masks."""
        sparsifier = self.sparsifier
        return SparseGraph(module).sparsify(sparsifier)
