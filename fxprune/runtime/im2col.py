"""Patches of an image as rows of a matrix, so that a convolution is a linear layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fxprune.runtime.library import define

__all__ = ["im2col", "window_counts"]


def window_counts(
    image: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Return how many windows an image of some height and width has below and beside each other."""
    every = zip(image, kernel, stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in every]


def _im2col(
    input: Tensor,  # noqa: A002
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    fill: int,
) -> Tensor:
    if fill and input.dtype != torch.uint8:
        raise ValueError("only levels are filled up with anything but 0")
    if input.dim() != 4:
        raise ValueError(f"expected images [batch, height, width, channels], not {list(input.shape)}")
    height, width = window_counts(input.shape[1:3], kernel, stride, padding, dilation)
    if min(height, width) < 1:
        raise ValueError(f"a kernel of {list(kernel)} does not fit images of shape {list(input.shape)}")
    around = (0, 0, padding[1], padding[1], padding[0], padding[0])
    padded = functional.pad(input, around, value=fill)
    taps = []
    for y, x in itertools.product(range(kernel[0]), range(kernel[1])):
        top, left = y * dilation[0], x * dilation[1]
        rows = slice(top, top + stride[0] * (height - 1) + 1, stride[0])
        columns = slice(left, left + stride[1] * (width - 1) + 1, stride[1])
        taps.append(padded[:, rows, columns])
    return torch.cat(taps, 3)


def _fake(
    input: Tensor,  # noqa: A002
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    fill: int,  # noqa: ARG001
) -> Tensor:
    height, width = window_counts(input.shape[1:3], kernel, stride, padding, dilation)
    return input.new_empty([input.shape[0], height, width, input.shape[3] * kernel[0] * kernel[1]])


im2col = define(
    "im2col(Tensor input, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, int fill) -> Tensor",
    _im2col,
    _fake,
)
"""`fxprune::im2col`: `[batch, height, width, C]` to `[batch, height', width', taps · C]`, a patch a position.

The taps of a patch lie row by row, the channels of each beside each other; what lies outside the image is `fill`.
"""
