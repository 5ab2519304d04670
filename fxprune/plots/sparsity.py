"""Plots of sparse layers, and of where the multiply-accumulates went (paper 000, Figures 2b and 2c)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fxprune.errors import InputError
from fxprune.insights.profile import SparsityProfile
from fxprune.insights.roles import ROLES
from fxprune.plots.axes import AFTER, BEFORE, COLOURS, count_layers, drawn_axes, legend_above, name_places

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_macs_by_role", "plot_sparsity"]


def plot_sparsity(profile: SparsityProfile, target: str | os.PathLike[str] | Axes) -> Axes:
    """Draw the sparsity of every 1×1 convolution, and of other layers that are sparse (paper 000, Figure 2b).

    Args:
        profile: of `sparsity_profile`.
        target: a file to write (.png, .svg, .pdf), or the axes to draw in.
    """
    rows = [row for row in profile.layers if row.role != ROLES[-1] or row.sparsity > 0]
    if not rows:
        raise InputError("the profile has no 1×1 convolution and no sparse layer; there is nothing to plot")
    with drawn_axes(target, width=min(max(7.0, 0.12 * len(rows)), 16.0), height=5.0) as axes:
        for role in ROLES:
            places = [i for i, row in enumerate(rows) if row.role == role]
            if places:
                heights = [100 * rows[i].sparsity for i in places]
                axes.bar(places, heights, 0.8, label=role, color=COLOURS[role])
        name_places(axes, [row.layer for row in rows])
        axes.set_ylim(0, 100)
        axes.set_ylabel("sparsity, %")
        axes.set_title("Sparsity by layer, in the order of their calls")
        legend_above(axes)
    return axes


def plot_macs_by_role(profile: SparsityProfile, target: str | os.PathLike[str] | Axes) -> Axes:
    """Draw the multiply-accumulates of each role before and after pruning (paper 000, Figure 2c).

    Args:
        profile: of `sparsity_profile`.
        target: a file to write (.png, .svg, .pdf), or the axes to draw in.
    """
    roles = profile.roles
    if not roles:
        raise InputError("the profile has no layers; there is nothing to plot")
    with drawn_axes(target) as axes:
        for side, (label, colour) in enumerate([("before", BEFORE), ("after", AFTER)]):
            places = [i + 0.4 * side - 0.2 for i in range(len(roles))]
            bars = axes.bar(places, [role.macs[side] / 1e6 for role in roles], 0.38, label=label, color=colour)
            axes.bar_label(bars, fmt="{:,.4g}", padding=2, fontsize=8)
        names = [f"{role.role}\n{count_layers(role.layers)}\n{_left(role.macs)} left" for role in roles]
        axes.set_xticks(range(len(roles)), names)
        axes.margins(y=0.12)
        axes.set_ylabel("million multiply-accumulates")
        axes.set_title("Multiply-accumulates by role")
        axes.legend(frameon=False)
    return axes


def _left(macs: tuple[int, int]) -> str:
    return f"{macs[1] / max(macs[0], 1):.1%}"
