"""Small quantised networks, made without calibration."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from fxprune.graph.shapes import propagate_shapes
from fxprune.runtime.int8 import (
    Affine,
    BlockSparseInt8Linear,
    Int8Linear,
    Requantization,
    dequantize,
    quantize,
    quantize_weight,
)
from fxprune.runtime.int8.backends import refusal

__all__ = ["UNIT", "Chain", "Joined", "exactly", "int8_linear", "quantised"]

UNIT = Affine(0.05, 128)


def int8_linear(inputs: int, outputs: int, sparsity: float = 0.0, *, is_last: bool = False) -> Int8Linear:
    """Return a random layer with a share of its 1×4 blocks zero, that gives uint8 or, as the last, float32."""
    weight = torch.randn(outputs, inputs)
    kept = torch.rand(outputs, -(-inputs // 4)) >= sparsity
    levels, scales = quantize_weight(weight * kept.repeat_interleave(4, 1)[:, :inputs])
    requantization = Requantization.to_float(levels, scales, torch.randn(outputs), UNIT)
    if is_last:
        return Int8Linear(levels, requantization, UNIT)
    return Int8Linear(levels, requantization.to_levels(UNIT), UNIT, UNIT)


class Chain(nn.Module):
    """Three layers of channels that are no multiples of four, and a dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = int8_linear(6, 10, 0.6), int8_linear(10, 9, 0.6)
        self.drop, self.c = nn.Dropout(), int8_linear(9, 3, 0.6, is_last=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.drop(self.b(self.a(_levels(x)))))


class Joined(nn.Module):
    """Values that several read: layers, a permute, a return to floats."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = int8_linear(8, 8), int8_linear(8, 6, 0.7), int8_linear(8, 8, is_last=True)
        self.moved, self.head = int8_linear(8, 5, 0.7), int8_linear(6, 8, 0.9, is_last=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.stem(_levels(x))
        moved = self.moved(y.permute(0, 2, 1).flip(1).permute(0, 2, 1))
        sums = dequantize(y, UNIT.scale, UNIT.zero_point, "channels-last", 8) + self.right(y) + self.head(self.left(y))
        return sums, dequantize(moved, UNIT.scale, UNIT.zero_point, "channels-last", 5), y.flip(0)


def _levels(x: Tensor) -> Tensor:
    return quantize(x, UNIT.scale, UNIT.zero_point, "channels-last")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True


def quantised(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """Return the graph of a quantised network, with shapes."""
    graph = _Tracer().trace(model.eval())
    module = fx.GraphModule(model, graph, type(model).__name__)
    next(iter(graph.nodes)).meta["val"] = x.to("meta")
    propagate_shapes(module)
    return module


def exactly(module: fx.GraphModule) -> fx.GraphModule:
    """Return a lowered graph whose layers are computed exactly on every machine, also on one without a compiler."""
    copied = copy.deepcopy(module)
    for layer in copied.modules():
        if isinstance(layer, BlockSparseInt8Linear) and refusal(layer.backend, layer.block, layer.dtype):
            layer.backend = "reference"
    return copied
