"""Plots of insights, drawn by matplotlib without a display; needs the extra `plots`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.errors import ArtifactError, InputError, SpecError, UsageError
from fxprune.insights.profile import SparsityProfile
from fxprune.insights.roles import ROLES
from fxprune.insights.sensitivity import Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "check_plot",
    "plot_macs_by_role",
    "plot_pruned_weights",
    "plot_sensitivity",
    "plot_sparsity",
    "plot_trace",
]

_COLOURS = dict(zip(ROLES, ("#0072B2", "#D55E00", "#009E73", "#7F7F7F"), strict=True))
"""Told apart by colour-blind readers too (Okabe and Ito, 2008)."""

_BEFORE, _AFTER = "#BBBBBB", "#0072B2"

_SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise `UsageError` where matplotlib is missing, and `SpecError` for a file of another kind than it draws."""
    _figure_type()
    if Path(path).suffix not in _SUFFIXES:
        raise SpecError(f"cannot draw to '{path}'; give a file that ends in {', '.join(_SUFFIXES)}")


def _figure_type() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'fxprune[plots]'") from None
    return Figure


@contextmanager
def _axes(target: str | os.PathLike[str] | Axes, width: float = 7.0, height: float = 4.0) -> Iterator[Axes]:
    """Yield the axes that are given, or those of a new figure that is written to a file at the end (inches)."""
    if not isinstance(target, (str, os.PathLike)):
        yield target
        return
    check_plot(target)
    figure = _figure_type()(figsize=(width, height), layout="constrained")
    yield figure.add_subplot()
    try:
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise ArtifactError(f"cannot write the plot '{target}': {error.strerror or error}") from error


def plot_sparsity(profile: SparsityProfile, target: str | os.PathLike[str] | Axes) -> Axes:
    """Draw the sparsity of every 1×1 convolution, and of other layers that are sparse (paper 000, Figure 2b).

    Args:
        profile: of `sparsity_profile`.
        target: a file to write (.png, .svg, .pdf), or the axes to draw in.
    """
    rows = [row for row in profile.layers if row.role != ROLES[-1] or row.sparsity > 0]
    if not rows:
        raise InputError("the profile has no 1×1 convolution and no sparse layer; there is nothing to plot")
    with _axes(target, width=min(max(7.0, 0.12 * len(rows)), 16.0), height=5.0) as axes:
        for role in ROLES:
            places = [i for i, row in enumerate(rows) if row.role == role]
            if places:
                heights = [100 * rows[i].sparsity for i in places]
                axes.bar(places, heights, 0.8, label=role, color=_COLOURS[role])
        _name_places(axes, [row.layer for row in rows])
        axes.set_ylim(0, 100)
        axes.set_ylabel("sparsity, %")
        axes.set_title("Sparsity by layer, in the order of their calls")
        _legend_above(axes)
    return axes


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    """Name the places 0, 1, … along the x axis, as many as are legible."""
    step = -(-len(names) // 40)
    places = range(0, len(names), step)
    axes.set_xticks(places, [names[i] for i in places], rotation=90, fontsize=7)
    axes.set_xlim(-0.7, len(names) - 0.3)


def _legend_above(axes: Axes) -> None:
    axes.set_title(axes.get_title(), pad=26)
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)


def plot_macs_by_role(profile: SparsityProfile, target: str | os.PathLike[str] | Axes) -> Axes:
    """Draw the multiply-accumulates of each role before and after pruning (paper 000, Figure 2c).

    Args:
        profile: of `sparsity_profile`.
        target: a file to write (.png, .svg, .pdf), or the axes to draw in.
    """
    roles = profile.roles
    if not roles:
        raise InputError("the profile has no layers; there is nothing to plot")
    with _axes(target) as axes:
        for side, (label, colour) in enumerate([("before", _BEFORE), ("after", _AFTER)]):
            places = [i + 0.4 * side - 0.2 for i in range(len(roles))]
            bars = axes.bar(places, [role.macs[side] / 1e6 for role in roles], 0.38, label=label, color=colour)
            axes.bar_label(bars, fmt="{:,.4g}", padding=2, fontsize=8)
        names = [f"{role.role}\n{_layers(role.layers)}\n{_left(role.macs)} left" for role in roles]
        axes.set_xticks(range(len(roles)), names)
        axes.margins(y=0.12)
        axes.set_ylabel("million multiply-accumulates")
        axes.set_title("Multiply-accumulates by role")
        axes.legend(frameon=False)
    return axes


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _left(macs: tuple[int, int]) -> str:
    return f"{macs[1] / max(macs[0], 1):.1%}"


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
    with _axes(target, height=4.8) as axes:
        for place, role in enumerate(found.roles):
            rows = sorted((row for row in found.layers if row.role == role.role), key=lambda row: row.value)
            _draw_role(axes, place, [row.value for row in rows], _COLOURS[role.role])
            axes.annotate(
                rows[0].layer, (place, rows[0].value), (0, -5), textcoords="offset points", ha="center", va="top",
                fontsize=7,
            )  # fmt: skip
        axes.axhline(found.baseline, color="black", linewidth=0.8, linestyle="--", label="no layer pruned")
        axes.set_xticks(range(len(found.roles)), [f"{role.role}\n{_layers(role.layers)}" for role in found.roles])
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
    with _axes(target) as axes:
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
    with _axes(target, width=5.5, height=5.0) as axes:
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
