"""Plot of the weights of a layer before and after pruning (paper 003, Figure 1)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxprune.errors import InputError
from fxprune.plots.axes import drawn_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_pruned_weights"]

_MOST_POINTS = 20_000


def plot_pruned_weights(
    original: Tensor,
    pruned: Tensor,
    target: str | os.PathLike[str] | Axes,
    *,
    threshold: float | None = None,
) -> Axes:
    """Scatter a layer's squared weights after pruning against those before (paper 003, Figure 1).

    Lines at the threshold part them: upper left those that were small and grew, lower right those that were large and
    are pruned. Of more than 20,000 weights as many are drawn, evenly spread. Zeros lie on the line of zero.

    Args:
        original: the weights before.
        pruned: the same weights after, in the same shape.
        target: a file to write (.png, .svg, .pdf), or the axes to draw in.
        threshold: τ of squared weights; none by default.
    """
    if original.shape != pruned.shape:
        shapes = f"{tuple(original.shape)} and {tuple(pruned.shape)}"
        raise InputError(f"the weights have shapes {shapes}; give one layer, before and after")
    pairs = torch.stack([original.detach().flatten(), pruned.detach().flatten()]).double().cpu().square()
    pairs = pairs[:, :: max(-(-pairs.shape[1] // _MOST_POINTS), 1)]
    positive = pairs[pairs > 0]
    if not positive.numel() or not bool(torch.isfinite(pairs).all()):
        raise InputError("the weights are all zero or not finite; there is nothing to plot")
    # Weights span decades, and zeros have no logarithm: below the smallest that matter the axes are linear.
    floor = float(positive.quantile(0.01)) if threshold is None or threshold <= 0 else threshold / 1000
    with drawn_axes(target, width=5.5, height=5.0) as axes:
        axes.set_xscale("symlog", linthresh=floor)
        axes.set_yscale("symlog", linthresh=floor)
        axes.scatter(pairs[0].numpy(), pairs[1].numpy(), 4, alpha=0.3, linewidths=0, rasterized=True)
        if threshold is not None:
            axes.axvline(threshold, color="red", linewidth=1)
            axes.axhline(threshold, color="red", linewidth=1, label=f"threshold {threshold:.3g}")
            axes.legend(frameon=False, fontsize=8, loc="upper left")
        axes.set_xlim(-floor / 2)
        axes.set_ylim(-floor / 2)
        axes.set_xlabel("squared weight before")
        axes.set_ylabel("squared weight after")
    return axes
