"""Mask the least important weights, single or in blocks, for a sparsity, MACs or parameter target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.graph.passes import Pass
from fxprune.sparsity.masks import SparseGraph
from fxprune.sparsity.selection import Sparsifier

__all__ = ["WeightSparsification"]


@dataclass(frozen=True)
class WeightSparsification(Sparsifier, Pass):
    """Zero weights in a pattern that a kernel can skip; the graph itself stays (paper 000, §3).

    Before: `%conv1 = conv1 Conv2d(64→256)(%x)`
    After: `%conv1 = conv1 Conv2d(64→256, 75.0% sparse)(%x)`; its weight is parametrised by a mask, which training keeps

    Its options are those of `fxprune.sparsity.selection.Sparsifier`. A mask that is there already is narrowed.
    """

    name: ClassVar[str] = "weight-sparsification"

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Choose and write the masks."""
        return SparseGraph(module).sparsify(self)
