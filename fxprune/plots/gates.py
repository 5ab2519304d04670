"""Plot of how gates came to decide (paper 001, §5)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.errors import InputError
from fxprune.gating.trail import GateTrail
from fxprune.plots.axes import AFTER, CONTRAST, drawn_figure
from fxprune.plots.widths import short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

__all__ = ["plot_gates"]

_BINS = 40
_MOST_STEPS = 400
_ROW, _HIGHEST = 0.12, 6.0
"""Inches that a row of an orbit is high, where there is room, and that all together are at most."""


def plot_gates(trail: GateTrail, target: str | os.PathLike[str] | FigureBase) -> FigureBase:
    """Draw how probable it was in the course of training that channels stay.

    Above, how many gates had which probability; in the middle, what they let expect of the multiply-accumulates, and
    how many of them stood at one half or above; below, the mean of every orbit, which its first layer names. Of more
    than 400 steps as many are drawn, evenly spread.

    Args:
        trail: of `learn_channels`, `Learned.trail`.
        target: a file to write (.png, .svg, .pdf), or the figure to draw in.
    """
    if not trail.steps or not trail.probabilities:
        raise InputError("the trail has no steps or no gates; there is nothing to plot")
    if not all(bool(torch.isfinite(found).all()) for found in trail.probabilities.values()):
        raise InputError("the trail has probabilities that are not finite; there is nothing to plot")
    rows = min(max(1.2, _ROW * len(trail.probabilities)), _HIGHEST)
    with drawn_figure(target, 7.5, 4.6 + rows) as figure:
        axes = figure.subplots(3, 1, sharex=True, height_ratios=[2.4, 1.6, rows])
        chosen = _spread(len(trail.steps))
        edges = _edges(torch.tensor(trail.steps, dtype=torch.float64)[chosen])
        every = torch.cat(list(trail.probabilities.values()), 1).detach().float().cpu()
        _draw_density(axes[0], edges, every[chosen])
        _draw_shares(axes[1], trail, every)
        _draw_orbits(axes[2], edges, trail, chosen)
        axes[2].set_xlim(float(edges[0]), float(edges[-1]))
        axes[2].set_xlabel("step")
        axes[2].locator_params(axis="x", integer=True, min_n_ticks=1)
    return figure


def _spread(count: int) -> Tensor:
    """Return which of so many steps are drawn: the first, the last, and some between."""
    return torch.linspace(0, count - 1, min(count, _MOST_STEPS)).round().long()


def _edges(steps: Tensor) -> Tensor:
    """Return where the columns of steps begin and end: half way between them, the outer ones at their steps."""
    if len(steps) == 1:
        return torch.stack([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return torch.cat([steps[:1], middles, steps[-1:]])


def _draw_density(axes: Axes, edges: Tensor, probabilities: Tensor) -> None:
    from matplotlib.colors import LogNorm

    bins = (probabilities * _BINS).long().clamp(0, _BINS - 1)
    counts = torch.zeros(len(probabilities), _BINS).scatter_add_(1, bins, torch.ones_like(probabilities))
    shown = counts.where(counts > 0, torch.nan).T
    # A gate alone shall be seen, so that the scale begins below one.
    scale = LogNorm(0.3, max(float(counts.max()), 10.0))
    mesh = _mesh(axes, edges, torch.linspace(0, 1, _BINS + 1), shown, norm=scale, cmap="Blues")
    axes.set_ylabel("probability to stay")
    bar = axes.figure.colorbar(mesh, ax=axes, label="gates", pad=0.01)
    bar.ax.set_ylim(1, scale.vmax)


def _draw_shares(axes: Axes, trail: GateTrail, probabilities: Tensor) -> None:
    open_gates = (probabilities >= 0.5).double().mean(1)
    lines = {"expected MACs": (list(trail.macs), AFTER), "gates at 0.5 or above": (open_gates.tolist(), CONTRAST)}
    marker = "o" if len(trail.steps) == 1 else ""  # one point makes no line
    for name, (shares, colour) in lines.items():
        label = f"{name}, {shares[-1]:.1%} in the end"
        axes.plot(trail.steps, [100 * share for share in shares], color=colour, label=label, marker=marker)
    axes.set_ylim(0, 105)
    axes.set_ylabel("left, %")
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)


def _draw_orbits(axes: Axes, edges: Tensor, trail: GateTrail, chosen: Tensor) -> None:
    means = torch.stack([found.detach().float().cpu()[chosen].mean(1) for found in trail.probabilities.values()])
    names = [f"{_named(trail.layers[name]) or name} ({found.shape[1]})" for name, found in trail.probabilities.items()]
    mesh = _mesh(axes, edges, torch.arange(len(names) + 1) - 0.5, means, vmin=0, vmax=1, cmap="viridis")
    step = -(-len(names) // int(_HIGHEST / _ROW))
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=6)
    axes.invert_yaxis()
    axes.set_ylabel("layers (gates)")
    axes.figure.colorbar(mesh, ax=axes, label="mean probability", pad=0.01)


def _named(layers: Sequence[str]) -> str:
    """Name layers by the first of them, and how many more there are; parameters of the model itself have no name."""
    more = f" +{len(layers) - 1}" if len(layers) > 1 else ""
    return f"{short_name(layers[0])}{more}" if layers else ""


def _mesh(axes: Axes, columns: Tensor, rows: Tensor, values: Tensor, **colours: Any) -> Any:
    return axes.pcolormesh(columns.numpy(), rows.numpy(), values.numpy(), rasterized=True, **colours)
