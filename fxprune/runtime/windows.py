"""The padding of two-dimensional convolutions, in numbers."""

from __future__ import annotations

from torch.nn.modules.conv import _ConvNd

__all__ = ["paddings", "pads_evenly"]


def pads_evenly(layer: _ConvNd) -> bool:
    """Whether a convolution pads with zeros, as many on either side."""
    reach = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    return layer.padding_mode == "zeros" and (layer.padding != "same" or not any(r % 2 for r in reach))


def paddings(layer: _ConvNd) -> list[int]:
    """Return the padding on either side of every dimension of a convolution that pads evenly.

    >>> from torch import nn
    >>> paddings(nn.Conv2d(8, 8, (3, 5), padding="same", dilation=2))
    [2, 4]
    """
    if isinstance(layer.padding, str):
        sizes = zip(layer.kernel_size, layer.dilation, strict=True)
        return [d * (k - 1) // 2 if layer.padding == "same" else 0 for k, d in sizes]
    return list(layer.padding)
