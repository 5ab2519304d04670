"""Plot of what a model loses when one layer alone is pruned (paper 000, Figure 2d)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fxprune.errors import InputError
from fxprune.insights.sensitivity import Sensitivity
from fxprune.plots.axes import COLOURS, count_layers, drawn_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_sensitivity"]


def plot_sensitivity(found: Sensitivity, target: str | os.PathLike[str] | Axes) -> Axes:
    """Draw how the metric is distributed when one layer alone is pruned, by role (paper 000, Figure 2d).

    Boxes span the quartiles, their whiskers all layers; every point is one layer, the most sensitive of each role is
    named.

    Args:
        found: of `sensitivity`.
        target: a file to write (.png, .svg, .pdf), or the axes to draw in.
    """
    if not found.layers:
        raise InputError("no layer was evaluated; there is nothing to plot")
    with drawn_axes(target, height=4.8) as axes:
        for place, role in enumerate(found.roles):
            rows = sorted((row for row in found.layers if row.role == role.role), key=lambda row: row.value)
            _draw_role(axes, place, [row.value for row in rows], COLOURS[role.role])
            axes.annotate(
                rows[0].layer, (place, rows[0].value), (0, -5), textcoords="offset points", ha="center", va="top",
                fontsize=7,
            )  # fmt: skip
        axes.axhline(found.baseline, color="black", linewidth=0.8, linestyle="--", label="no layer pruned")
        axes.set_xticks(range(len(found.roles)), [f"{role.role}\n{count_layers(role.layers)}" for role in found.roles])
        axes.set_xlim(-0.6, len(found.roles) - 0.4)
        axes.margins(y=0.1)
        axes.set_ylabel(found.metric)
        axes.set_title(f"One layer at a time {found.sparsity:.0%} sparse, in blocks of {found.block}")
        axes.legend(frameon=False, fontsize=8)
    return axes


def _draw_role(axes: Axes, place: int, values: Sequence[float], colour: str) -> None:
    line = {"color": colour, "linewidth": 1.2}
    axes.boxplot(
        [values], positions=[place], widths=0.5, whis=(0, 100), boxprops=line, whiskerprops=line, capprops=line,
        medianprops=line | {"linewidth": 2.4}, manage_ticks=False,
    )  # fmt: skip
    # Points of one column are set apart by a fixed pattern, so that a plot drawn twice is the same.
    places = [place + 0.16 * ((i * 0.618) % 1 - 0.5) for i in range(len(values))]
    axes.scatter(places, values, 14, color=colour, alpha=0.6, linewidths=0, zorder=3)
