"""Plots of insights, drawn by matplotlib without a display; needs the extra `plots`."""

from __future__ import annotations

from fxprune.plots.axes import check_plot
from fxprune.plots.gates import plot_gates
from fxprune.plots.sensitivity import plot_sensitivity
from fxprune.plots.sparsity import plot_macs_by_role, plot_sparsity
from fxprune.plots.traces import plot_trace
from fxprune.plots.weights import plot_pruned_weights
from fxprune.plots.widths import plot_widths

__all__ = [
    "check_plot",
    "plot_gates",
    "plot_macs_by_role",
    "plot_pruned_weights",
    "plot_sensitivity",
    "plot_sparsity",
    "plot_trace",
    "plot_widths",
]
