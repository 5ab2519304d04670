"""Affine uint8 quantisation of activations: q = clamp(round(x / scale) + zero_point, 0, 255)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.runtime.int8.layouts import CHANNELS_LAST, PACKED, first_channels, pack, packed_shape, to_channels_last
from fxprune.runtime.library import define

__all__ = ["LEVELS", "Affine", "dequantize", "quantize"]

LEVELS = 255
"""The largest value of a quantised activation; the smallest is 0."""


@dataclass(frozen=True)
class Affine:
    """What a quantised activation stands for: x = scale · (q − zero_point).

    Raises `ValueError` unless `scale` is positive and finite and `zero_point` in 0 … 255.
    """

    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"a scale of {self.scale} quantises nothing; it must be positive and finite")
        if not 0 <= self.zero_point <= LEVELS:
            raise ValueError(f"zero point {self.zero_point} is not in 0 … {LEVELS}")

    def quantize(self, x: Tensor) -> Tensor:
        """Return float `x` as uint8 of the same shape."""
        return quantize(x, self.scale, self.zero_point, CHANNELS_LAST)

    def dequantize(self, q: Tensor) -> Tensor:
        """Return the float32 values that uint8 `q` stands for."""
        return dequantize(q, self.scale, self.zero_point, CHANNELS_LAST, q.shape[-1])

    def level(self, x: float) -> float:
        """Return the level that is nearest to `x`, in 0 … 255."""
        return float(min(max(round(x / self.scale) + self.zero_point, 0), LEVELS))


def _quantize(input: Tensor, scale: float, zero_point: int, layout: str) -> Tensor:  # noqa: A002
    if not input.dim():
        raise ValueError("a number without dimensions has no channels")
    inverse = torch.tensor(1 / scale, dtype=torch.float32, device=input.device)
    levels = (input.float() * inverse).round() + zero_point
    values = levels.nan_to_num(0, LEVELS, 0).clamp(0, LEVELS).to(torch.uint8).contiguous()
    return values if layout == CHANNELS_LAST else pack(values)


def _quantized(input: Tensor, scale: float, zero_point: int, layout: str) -> Tensor:  # noqa: A002, ARG001
    shape = packed_shape(input.shape) if layout == PACKED else list(input.shape)
    return input.new_empty(shape, dtype=torch.uint8)


def _dequantize(input: Tensor, scale: float, zero_point: int, layout: str, channels: int) -> Tensor:  # noqa: A002
    values = first_channels(to_channels_last(input, layout), channels)
    return ((values.to(torch.int32) - zero_point).float() * scale).contiguous()


def _dequantized(input: Tensor, scale: float, zero_point: int, layout: str, channels: int) -> Tensor:  # noqa: A002, ARG001
    positions = input.shape[1:-1] if layout == PACKED else input.shape[:-1]
    return input.new_empty([*positions, channels], dtype=torch.float32)


quantize = define("quantize(Tensor input, float scale, int zero_point, str layout) -> Tensor", _quantize, _quantized)
"""`fxprune::quantize`: float `[…, C]` to uint8 in a layout; not a number becomes 0."""

dequantize = define(
    "dequantize(Tensor input, float scale, int zero_point, str layout, int channels) -> Tensor",
    _dequantize,
    _dequantized,
)
"""`fxprune::dequantize`: uint8 in a layout to float32 `[…, channels]`."""
