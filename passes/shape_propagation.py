"""Shapes, dtypes and memory formats into `node.meta`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from fxprune.graph.passes import Pass
from fxprune.graph.shapes import propagate_shapes

__all__ = ["ShapePropagation"]


@dataclass(frozen=True)
class ShapePropagation(Pass):
    """Write shapes, dtypes and memory formats into `meta["val"]` and `meta["tensor_meta"]`; the graph itself stays.

    Before: `%conv1 = conv1 Conv2d(3→64)(%x)`
    After: `%conv1 = conv1 Conv2d(3→64)(%x) : f32[1, 64, 112, 112]`
    """

    name: ClassVar[str] = "shape-propagation"

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Annotate; nothing that computes is changed."""
        propagate_shapes(module)
        for node in module.graph.nodes:
            if isinstance(node.meta["val"], Tensor):
                node.meta["tensor_meta"] = _extract_tensor_metadata(node.meta["val"])
        return False
