"""The layers that compute on uint8, made of float layers and numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fxprune.quantization.activations import Activation
from fxprune.runtime.int8 import Affine, Int8DepthwiseConv2d, Int8Linear, Requantization, quantize_weight, tabulate
from fxprune.runtime.windows import paddings

__all__ = ["Numbers", "depthwise", "linear"]


@dataclass(frozen=True)
class Numbers:
    """What a layer takes and gives.

    Attributes:
        source: quantisation of its input.
        target: of its result, None where that is float32.
        activation: what it computes behind its sums, if anything.
        before: quantisation of what a table takes, None where there is no table.
    """

    source: Affine
    target: Affine | None
    activation: Activation | None
    before: Affine | None

    @property
    def name(self) -> str:
        """The name of the activation, "" for none."""
        return "" if self.activation is None else self.activation.name

    def of(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Requantization]:
        """Return the int8 levels of a weight [N, products], and what makes the layer's results of its sums."""
        levels, scales = quantize_weight(weight)
        found = Requantization.to_float(levels, scales, bias, self.source)
        if self.activation is not None and self.activation.bounds is not None:
            low, high = self.activation.bounds
            found = replace(found, low=low, high=high)
        if self.target is not None:
            found = found.to_levels(self.target if self.before is None else self.before)
        if self.activation is not None and self.before is not None and self.target is not None:
            table = tabulate(self.activation.function, self.before, self.target)
            found = replace(found, table=table.to(levels.device))
        return levels, found


def linear(layer: Any, numbers: Numbers) -> Int8Linear:
    """Make a linear layer."""
    levels, found = numbers.of(layer.weight, layer.bias)
    return Int8Linear(levels, found, numbers.source, numbers.target, numbers.name)


def depthwise(layer: Any, numbers: Numbers) -> Int8DepthwiseConv2d:
    """Make a depthwise convolution; around its images is the level of zero, so that sums have as many products."""
    levels, found = numbers.of(layer.weight.flatten(1), layer.bias)
    window = (layer.kernel_size, layer.stride, paddings(layer), layer.dilation)
    return Int8DepthwiseConv2d(levels.t().contiguous(), found, window, numbers.source, numbers.target, numbers.name)
