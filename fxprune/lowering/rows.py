"""What computes the layers of a lowered graph, for its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from fxprune.lowering.choices import zero_blocks
from fxprune.lowering.measuring import FLOAT
from fxprune.report import LoweredLayer
from fxprune.runtime.int8 import PACKED, BlockSparseInt8Linear, Int8DepthwiseConv2d
from fxprune.runtime.int8.layer import Int8Layer

__all__ = ["lowered_rows"]

_BLOCK = "1x4"
"""The blocks of which zero ones are counted."""


def lowered_rows(
    module: fx.GraphModule,
    choices: Mapping[str, str],
    floating: Mapping[str, str],
    times: Mapping[str, Mapping[str, float]],
) -> Iterator[LoweredLayer]:
    """Yield a row for every call of a convolution or a linear layer.

    Args:
        module: a lowered graph, with shapes.
        choices: path → what computes a layer on uint8.
        floating: path → why it stays in float.
        times: path → microseconds by candidate, of what was measured.
    """
    for node in module.graph.nodes:
        path = str(node.target)
        leaf = module.get_submodule(path) if node.op == "call_module" else None
        if isinstance(leaf, (Int8Layer, nn.Linear, _ConvNd)):
            zeros = zero_blocks(_levels(leaf), _BLOCK)
            runs, reason = choices.get(path, FLOAT), floating.get(path, "")
            yield LoweredLayer(path, _shape(leaf, node), round(zeros, 4), runs, reason, dict(times.get(path, {})))


def _levels(leaf: Any) -> Tensor:
    """Return int8 [N, K], zero where the weight is."""
    weight: Tensor = leaf.weight.detach()
    if isinstance(leaf, Int8DepthwiseConv2d):
        return weight.t()
    return weight if weight.dtype == torch.int8 else (weight != 0).to(torch.int8).flatten(1)


def _shape(leaf: Any, node: fx.Node) -> tuple[int, int, int]:
    """Return M, K and N of the product that a layer is."""
    value: Tensor = node.meta["val"]
    outputs: int = leaf.out_features if hasattr(leaf, "out_features") else leaf.out_channels
    is_packed = isinstance(leaf, BlockSparseInt8Linear) and leaf.output_layout == PACKED
    positions = value.shape[1:-1].numel() if is_packed else value.numel() // max(outputs, 1)
    return positions, leaf.weight.numel() // max(outputs, 1), outputs
