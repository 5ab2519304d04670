"""Plot of a metric against sparsity."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fxprune.errors import InputError
from fxprune.plots.axes import drawn_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_trace"]


def plot_trace(
    traces: Mapping[str, Sequence[tuple[float, float]]],
    target: str | os.PathLike[str] | Axes,
    *,
    metric: str = "top-1 accuracy, %",
) -> Axes:
    """Draw a metric against sparsity, one line for each trace: of a run's checkpoints, or of methods to compare.

    Args:
        traces: name → (sparsity in [0, 1], value of the metric) of each network.
        target: a file to write (.png, .svg, .pdf), or the axes to draw in.
        metric: what the values are.
    """
    if not any(traces.values()):
        raise InputError("the traces have no points; there is nothing to plot")
    with drawn_axes(target) as axes:
        for (name, points), marker in zip(traces.items(), _markers(len(traces)), strict=True):
            ordered = sorted(points)
            axes.plot([100 * s for s, _ in ordered], [v for _, v in ordered], marker=marker, markersize=5, label=name)
        axes.set_xlabel("sparsity, %")
        axes.set_ylabel(metric)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9)
    return axes


def _markers(count: int) -> str:
    shapes = "osD^vPX*<>"
    return (shapes * (-(-count // len(shapes))))[:count]
