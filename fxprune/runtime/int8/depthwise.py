"""Depthwise convolutions of quantised images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fxprune.runtime.im2col import window_counts
from fxprune.runtime.int8.affine import Affine
from fxprune.runtime.int8.layer import Int8Layer
from fxprune.runtime.int8.requantization import Requantization, requantize
from fxprune.runtime.library import define

__all__ = ["Int8DepthwiseConv2d", "depthwise_int8_conv2d"]


def _depthwise(input: Tensor, weight: Tensor, *arguments: Any) -> Tensor:  # noqa: A002
    *numbers, kernel, stride, padding, dilation, fill = arguments
    around = (padding[1], padding[1], padding[0], padding[0])
    levels = functional.pad(input.double(), around, value=fill)
    filters = weight.t().unflatten(1, (1, *kernel)).double()
    sums = functional.conv2d(levels, filters, None, stride, 0, dilation, len(filters)).to(torch.int32)
    rows = sums.permute(0, 2, 3, 1)
    return requantize(rows, Requantization(*numbers)).contiguous().permute(0, 3, 1, 2)


def _fake(input: Tensor, weight: Tensor, *arguments: Any) -> Tensor:  # noqa: A002, ARG001
    dtype, kernel, stride, padding, dilation = arguments[6:11]
    sizes = window_counts(input.shape[2:], kernel, stride, padding, dilation)
    images = input.new_empty([input.shape[0], *sizes, input.shape[1]], dtype=dtype)
    return images.permute(0, 3, 1, 2)


depthwise_int8_conv2d = define(
    "depthwise_int8_conv2d(Tensor input, Tensor weight, Tensor offsets, Tensor multiplier, Tensor addend, "
    "Tensor? table, float low, float high, ScalarType dtype, int[2] kernel, int[2] stride, int[2] padding, "
    "int[2] dilation, int fill) -> Tensor",
    _depthwise,
    _fake,
)
"""`fxprune::depthwise_int8_conv2d`: uint8 [batch, C, height, width] to uint8 or float32, channels last in memory.

`weight` is int8 [taps, C], `fill` the level outside the image, that of zero; the numbers between them are those of
`fxprune.runtime.int8.requantization`.
"""


class Int8DepthwiseConv2d(Int8Layer):
    """A depthwise convolution of uint8 images with an int8 weight, and the activation behind it.

    Takes uint8 [batch, C, height, width], fastest where channels lie last in memory, and gives uint8 or float32 whose
    channels do. The compiled kernel gives what the integer reference gives, bit for bit.
    """

    weight: Tensor

    def __init__(
        self,
        weight: Tensor,
        requantization: Requantization,
        window: Sequence[Sequence[int]],
        source: Affine,
        target: Affine | None = None,
        activation: str = "",
    ) -> None:
        """Hold an int8 weight [taps, C]; `window` are kernel, stride, padding and dilation, vertical sizes first."""
        super().__init__(requantization, weight.shape[0], source, target, activation)
        self.in_channels = self.out_channels = self.groups = weight.shape[1]
        self.window = tuple(list(sizes) for sizes in window)
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return uint8 or float32 [batch, C, height', width'] of uint8 [batch, C, height, width]."""
        return depthwise_int8_conv2d(input, self.weight, *self.numbers, *self.window, self.source.zero_point)

    def extra_repr(self) -> str:
        """Name the channels, the window, the activation and what comes out."""
        words = [self.activation] if self.activation else []
        kernel, stride = ("x".join(map(str, sizes)) for sizes in self.window[:2])
        words += [f"{kernel} by {stride}", "u8" if self.dtype == torch.uint8 else "f32"]
        return f"{self.in_channels}, {', '.join(words)}"
