"""Plot of how wide every layer was and is (paper 001, Figure 6)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from fxprune.errors import InputError
from fxprune.insights.widths import LayerWidth, StageWidth, stage_widths
from fxprune.plots.axes import AFTER, BEFORE, drawn_axes, inches_wide, name_places

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_widths", "short_name"]

_BAND = "#F3F3F3"
_LINE, _SMALL_LINE, _LETTER = 0.11, 0.09, 0.065
"""Inches that a line of small print is high, one of still smaller print, and that a letter is wide."""

_LONGEST = 32
"""Letters of a layer's name that are shown, its first and last ones."""


def plot_widths(widths: Sequence[LayerWidth], target: str | os.PathLike[str] | Axes) -> Axes:
    """Draw the channels of every layer before and after pruning, stage by stage (paper 001, Figure 6).

    A percentage over a bar says what is left of a layer that lost channels, one over a stage what is left of all its
    layers.

    Args:
        widths: of `layer_widths`.
        target: a file to write (.png, .svg, .pdf), or the axes to draw in.
    """
    if not widths:
        raise InputError("there is no layer that makes channels; there is nothing to plot")
    with drawn_axes(target, width=min(max(7.0, 1.0 + 0.16 * len(widths)), 18.0), height=5.0) as axes:
        inches = inches_wide(axes) / len(widths)
        for side, (label, colour) in enumerate([("before", BEFORE), ("after", AFTER)]):
            axes.bar(range(len(widths)), [row.channels[side] for row in widths], 0.8, label=label, color=colour)
        if inches >= _SMALL_LINE:
            _write_shares(axes, widths)
        _mark_stages(axes, stage_widths(widths), inches)
        name_places(axes, [short_name(row.layer) for row in widths], most=max(int(inches_wide(axes) / _LINE), 1))
        axes.set_ylim(0, 1.22 * max(max(row.channels) for row in widths))  # the legend stands above all bars
        axes.set_ylabel("channels")
        axes.legend(ncols=2, loc="upper left", frameon=False, fontsize=8)
    return axes


def _write_shares(axes: Axes, widths: Sequence[LayerWidth]) -> None:
    """Write over the bars of layers that lost channels what is left of them."""
    for place, row in enumerate(widths):
        before, after = row.channels
        if after < before:
            axes.annotate(
                _percent(after / before), (place, before), (0, 2), textcoords="offset points", rotation=90, ha="center",
                va="bottom", fontsize=6, color="#555555",
            )  # fmt: skip


def _percent(share: float) -> str:
    """Write a share without decimals, but nothing as none or as all that is not."""
    if 0 < share < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= share < 1 else f"{share:.0%}"


def short_name(name: str) -> str:
    """Leave out the middle of a long name: its ends tell layers apart."""
    half = _LONGEST // 2
    return name if len(name) <= _LONGEST else f"{name[: half - 1]}…{name[-half:]}"


def _mark_stages(axes: Axes, stages: Sequence[StageWidth], inches: float) -> None:
    """Shade every second stage, and name them above the axes; `inches` is how far layers stand apart."""
    edges = list(pairwise(accumulate((stage.layers for stage in stages), initial=-0.5)))
    for low, high in edges[1::2]:
        axes.axvspan(low, high, color=_BAND, zorder=0, linewidth=0)
    centres = [(low + high) / 2 for low, high in edges]
    names = [f"{stage.stage}\n{_percent(stage.kept)}" for stage in stages]
    if _fit([centre * inches for centre in centres], names):
        _name_stages(axes, centres, names, rotation=0)
        return
    chosen = _apart(centres, _LINE / inches)
    _name_stages(axes, [centres[i] for i in chosen], [names[i].replace("\n", "  ") for i in chosen], rotation=90)


def _name_stages(axes: Axes, centres: Sequence[float], names: Sequence[str], rotation: int) -> None:
    for centre, name in zip(centres, names, strict=True):
        axes.annotate(
            name, (centre, 1), (0, 4), xycoords=axes.get_xaxis_transform(), textcoords="offset points", ha="center",
            va="bottom", fontsize=7, rotation=rotation,
        )  # fmt: skip


def _fit(centres: Sequence[float], names: Sequence[str]) -> bool:
    """Whether names stand side by side at these places, in inches."""
    lengths = [_LETTER * max(len(line) for line in name.split("\n")) for name in names]
    rows = zip(pairwise(centres), pairwise(lengths), strict=True)
    return all(right - left >= (a + b) / 2 for (left, right), (a, b) in rows)


def _apart(centres: Sequence[float], distance: float) -> list[int]:
    """Return which of ascending places are named so that no two are nearer to each other."""
    chosen: list[int] = []
    for i, centre in enumerate(centres):
        if not chosen or centre - centres[chosen[-1]] >= distance:
            chosen.append(i)
    return chosen
