"""Compute linear layers and depthwise convolutions on 8-bit integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from fxprune.graph.passes import Pass
from fxprune.quantization import DEPTHWISE, Ranges, Wanted, choose, quantize_layers

__all__ = ["Quantization"]


@dataclass(frozen=True)
class Quantization(Pass):
    """Turn linear layers and depthwise convolutions into layers on uint8 with int8 weights, activations included.

    Before: `%fc1 = fc1 Linear(8→16)(%x)`, `%relu = relu(%fc1)`, `%fc2 = fc2 Linear(16→8)(%relu)`
    After: `%quantize = fxprune.quantize(%x, 0.02, 50, 'channels-last')`,
    `%fc1 = fc1 Int8Linear(8→16, relu, u8)(%quantize)`, `%fc2 = fc2 Int8Linear(16→8, f32)(%fc1)`

    Activations are per-tensor affine, weights symmetric per output channel. A value stays uint8 where all of its
    readers take that (`fxprune.quantization.placement`). ReLU, ReLU6 and clamps behind a layer become its bounds, other
    activations a table of 256 levels. What cannot be quantised stays in float, and
    `fxprune.quantization.float_layers` says why.

    Options: `ranges` are what `fxprune.quantization.calibrate` found in the graph as it comes to this pass; `layers`
    and `exclude` are names, globs or types; `depthwise=False` leaves depthwise convolutions in float; `keep_float` maps
    single layers to the reason why they stay in float.
    """

    name: ClassVar[str] = "quantization"

    layers: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ranges: Ranges | None = field(default=None, compare=False)
    keep_float: Mapping[str, str] = field(default_factory=dict, compare=False)
    depthwise: bool = True

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Choose layers, forms and numbers, and edit the graph."""
        without = () if self.depthwise else (DEPTHWISE,)
        wanted = Wanted(tuple(self.layers), tuple(self.exclude), self.keep_float, without)
        return quantize_layers(module, choose(module, self.ranges, wanted))
