"""What every plot shares: where it is drawn, how places are named, its colours."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.errors import ArtifactError, SpecError, UsageError
from fxprune.insights.roles import ROLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

__all__ = [
    "AFTER",
    "BEFORE",
    "COLOURS",
    "CONTRAST",
    "check_plot",
    "count_layers",
    "drawn_axes",
    "drawn_figure",
    "inches_wide",
    "legend_above",
    "name_places",
]

COLOURS = dict(zip(ROLES, ("#0072B2", "#D55E00", "#009E73", "#7F7F7F"), strict=True))
"""Of roles; told apart by colour-blind readers too (Okabe and Ito, 2008)."""

BEFORE, AFTER, CONTRAST = "#BBBBBB", "#0072B2", "#D55E00"

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
def drawn_figure(target: str | os.PathLike[str] | FigureBase, width: float, height: float) -> Iterator[FigureBase]:
    """Yield the figure that is given, or a new one that is written to a file at the end (inches)."""
    if not isinstance(target, (str, os.PathLike)):
        yield target
        return
    check_plot(target)
    figure = _figure_type()(figsize=(width, height), layout="constrained")
    yield figure
    try:
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise ArtifactError(f"cannot write the plot '{target}': {error.strerror or error}") from error


@contextmanager
def drawn_axes(target: str | os.PathLike[str] | Axes, width: float = 7.0, height: float = 4.0) -> Iterator[Axes]:
    """Yield the axes that are given, or those of a new figure that is written to a file at the end (inches)."""
    if not isinstance(target, (str, os.PathLike)):
        yield target
        return
    with drawn_figure(target, width, height) as figure:
        yield figure.add_subplot()


def inches_wide(axes: Axes) -> float:
    """Return how wide axes are; before the layout of their figure is known, about as wide."""
    return float(axes.get_window_extent().transformed(axes.figure.dpi_scale_trans.inverted()).width)


def name_places(axes: Axes, names: Sequence[str], most: int = 40) -> None:
    """Name the places 0, 1, … along the x axis, as many as are legible: `most` at most."""
    step = -(-len(names) // most)
    places = range(0, len(names), step)
    axes.set_xticks(places, [names[i] for i in places], rotation=90, fontsize=7)
    axes.set_xlim(-0.7, len(names) - 0.3)


def legend_above(axes: Axes) -> None:
    """Put the legend between the title and the axes."""
    axes.set_title(axes.get_title(), pad=26)
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)


def count_layers(count: int) -> str:
    """Say how many layers: "1 layer", "2 layers"."""
    return f"{count} layer{'' if count == 1 else 's'}"
