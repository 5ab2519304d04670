"""How the channels of a quantised tensor lie in memory, and the operators that change it.

| layout | shape | what reads it |
| --- | --- | --- |
| channels-last | `[…, C]` | matrix products of other libraries, operators of torch |
| packed | `[ceil(C / 4), …, 4]` | our kernels: four channels of one position are what one `vpdpbusd` lane multiplies |

Channels that fill a packed tensor up to a multiple of four hold zeros when we write them and anything when we read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fxprune.runtime.library import define

__all__ = [
    "CHANNELS_LAST",
    "LANES",
    "LAYOUTS",
    "PACKED",
    "first_channels",
    "pack",
    "packed_shape",
    "to_channels_last",
    "unpack",
]

CHANNELS_LAST, PACKED = "channels-last", "packed"
LAYOUTS = (CHANNELS_LAST, PACKED)

LANES = 4
"""Channels that lie beside each other in a packed tensor."""


def packed_shape(shape: torch.Size) -> list[int]:
    """Return the packed shape of a channels-last one.

    >>> packed_shape(torch.Size([1, 7, 7, 18]))
    [5, 1, 7, 7, 4]
    """
    *positions, channels = shape
    return [-(-channels // LANES), *positions, LANES]


def _pack(input: Tensor) -> Tensor:  # noqa: A002
    fill = -input.shape[-1] % LANES
    padded = functional.pad(input, (0, fill)) if fill else input
    return padded.unflatten(-1, (-1, LANES)).movedim(-2, 0).contiguous()


def _unpack(input: Tensor, channels: int) -> Tensor:  # noqa: A002
    return first_channels(input.movedim(0, -2).flatten(-2), channels).contiguous()


def first_channels(levels: Tensor, channels: int) -> Tensor:
    """Return the first channels of a tensor `[…, C]`. Raises `ValueError` where it has fewer."""
    if not 0 <= channels <= levels.shape[-1]:
        raise ValueError(f"there are {levels.shape[-1]} channels, not {channels}")
    return levels[..., :channels]


pack = define(
    "pack(Tensor input) -> Tensor",
    _pack,
    lambda input: input.new_empty(packed_shape(input.shape)),  # noqa: A006
)
"""`fxprune::pack`: uint8 `[…, C]` to packed."""

unpack = define(
    "unpack(Tensor input, int channels) -> Tensor",
    _unpack,
    lambda input, channels: input.new_empty([*input.shape[1:-1], channels]),  # noqa: A006
)
"""`fxprune::unpack`: a packed tensor to uint8 `[…, channels]`."""


def to_channels_last(input: Tensor, layout: str) -> Tensor:  # noqa: A002
    """Return a quantised tensor as `[…, C]`, of a packed one with the channels that fill it up."""
    return input if layout == CHANNELS_LAST else _unpack(input, input.shape[0] * LANES)
