"""The bit-exact specification of the operator, in plain torch; it runs on every device that has float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.runtime.int8.blocks import BlockSparse, decompress
from fxprune.runtime.int8.layouts import PACKED, pack, to_channels_last
from fxprune.runtime.int8.requantization import Requantization, requantize

__all__ = ["accumulate", "linear"]


def accumulate(levels: Tensor, weight: Tensor) -> Tensor:
    """Return the int32 products [..., N] of uint8 levels [..., K] and an int8 weight [N, K].

    Float64 holds every sum of up to 2**37 such products exactly, and has a fast matrix product everywhere.
    """
    return (levels.double() @ weight.double().t()).to(torch.int32)


def linear(
    input: Tensor,  # noqa: A002
    values: Tensor,
    columns: Tensor,
    row_pointers: Tensor,
    offsets: Tensor,
    multiplier: Tensor,
    addend: Tensor,
    table: Tensor | None,
    low: float,
    high: float,
    dtype: torch.dtype,
    input_layout: str,
    output_layout: str,
) -> Tensor:
    """Compute `fxprune::block_sparse_int8_linear`; `linear_operator` says what the arguments are."""
    levels = to_channels_last(input, input_layout)
    shape = (multiplier.shape[0], levels.shape[-1])
    weight = decompress(BlockSparse(values, columns, row_pointers), shape)
    numbers = Requantization(offsets, multiplier, addend, table, low, high, dtype)
    output = requantize(accumulate(levels, weight), numbers)
    return pack(output) if output_layout == PACKED else output
