"""From int32 accumulators to what a quantised layer gives: bias, scales, activation, rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxprune.runtime.int8.affine import LEVELS, Affine

__all__ = ["Requantization", "requantize", "tabulate"]


@dataclass(frozen=True)
class Requantization:
    """What is done with the accumulators of every output channel n, in this order, every step rounded by itself.

        y = float32(accumulator + offsets[n]) · multiplier[n] + addend[n]
        float32 output: clamp(y, low, high)
        uint8 output:   table[round(clamp(y, low, high))], halves to even; without a table, the level itself

    `offsets` (int32 [N]) take the zero point of the input out; `multiplier` and `addend` (float32 [N]) hold the scales
    and the bias; `low` and `high` are ReLU, ReLU6 and the range of uint8; `table` (uint8 [256]) is any other
    activation.
    """

    offsets: Tensor
    multiplier: Tensor
    addend: Tensor
    table: Tensor | None = None
    low: float = -math.inf
    high: float = math.inf
    dtype: torch.dtype = torch.float32

    @staticmethod
    def to_float(weight: Tensor, scales: Tensor, bias: Tensor | None, source: Affine) -> Requantization:
        """Give float32 values.

        Args:
            weight: int8 [N, K].
            scales: float32 [N] of the weight's rows.
            bias: float32 [N].
            source: of the input.
        """
        offsets = -source.zero_point * weight.sum(1, dtype=torch.int32)
        addend = torch.zeros_like(scales) if bias is None else bias.detach().float().clone()
        return Requantization(offsets, (scales.double() * source.scale).float(), addend)

    def to_levels(self, target: Affine) -> Requantization:
        """Give uint8 instead, quantised as `target` says."""
        multiplier = self.multiplier.double() / target.scale
        addend = self.addend.double() / target.scale + target.zero_point
        low, high = (min(max(bound / target.scale + target.zero_point, 0), LEVELS) for bound in (self.low, self.high))
        return replace(
            self,
            multiplier=multiplier.float(),
            addend=addend.float(),
            low=float(round(low)),
            high=float(round(high)),
            dtype=torch.uint8,
        )


def tabulate(activation: Callable[[Tensor], Tensor], source: Affine, target: Affine) -> Tensor:
    """Return uint8 [256], the levels of an activation in `target` for every level of its input in `source`.

    >>> tabulate(torch.relu, Affine(1.0, 128), Affine(1.0, 0))[126:131].tolist()
    [0, 0, 0, 1, 2]
    """
    return target.quantize(activation(source.dequantize(torch.arange(LEVELS + 1, dtype=torch.uint8))))


def requantize(accumulators: Tensor, numbers: Requantization) -> Tensor:
    """Do what `Requantization` says with int32 accumulators […, N]; bounds of levels are levels, whatever is given."""
    low, high = numbers.low, numbers.high
    if numbers.dtype == torch.uint8:
        low, high = max(low, 0.0), min(high, float(LEVELS))
    values = (accumulators + numbers.offsets).float() * numbers.multiplier + numbers.addend
    clamped = values.clamp(low, high)
    if numbers.dtype == torch.float32:
        return clamped
    levels = clamped.round().to(torch.uint8)
    return levels if numbers.table is None else numbers.table[levels.int()]
