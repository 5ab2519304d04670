"""Pictures of the widths of layers: bars, shares, stages, and that nothing overlaps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fxprune import plots
from fxprune.insights.widths import LayerWidth
from tests.plots.samples import WIDTHS

figures = pytest.importorskip("matplotlib.figure")


def _axes() -> Any:
    return figures.Figure().add_subplot()


def _ticks(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def _texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_widths_are_drawn_before_and_after_in_one_place() -> None:
    axes = plots.plot_widths(WIDTHS, _axes())
    before, after = axes.containers
    assert [bar.get_height() for bar in before] == [16, 200, 32, 1000]
    assert [bar.get_height() for bar in after] == [4, 199, 32, 2]
    assert [bar.get_x() for bar in before] == [bar.get_x() for bar in after]
    assert _ticks(axes) == ["stem", "left.conv", "right.conv", "head"]


def test_a_share_is_written_of_layers_that_lost_channels_and_of_every_stage() -> None:
    axes = plots.plot_widths(WIDTHS, _axes())
    assert _texts(axes) == ["25%", ">99%", "<1%", "8×8\n25%", "4×4\n>99%", "vector\n<1%"]
    assert [text.xy[0] for text in axes.texts] == [0, 1, 3, 0, 1.5, 3]
    bands = [patch for patch in axes.patches if patch not in list(itertools.chain(*axes.containers))]
    assert [(band.get_x(), band.get_x() + band.get_width()) for band in bands] == [(0.5, 2.5)], "every second one"


def _layers(stages: Sequence[int], name: str = "features.{}.conv") -> list[LayerWidth]:
    numbers = itertools.count()
    return [
        LayerWidth(name.format(next(numbers)), "Conv2d", f"{1 + i % 2}28×128", (64, 32))
        for i, layers in enumerate(stages)
        for _ in range(layers)
    ]


CROWDED = {
    "20 layers": _layers([1, 4, 5, 5, 5]),
    "short stages": _layers([1] * 20),
    "150 layers": _layers([6, 9, 30, 105]),
    "150 stages": _layers([1] * 150),
    "400 layers": _layers([100, 1, 1, 1, 297]),
    "long names": _layers([2] * 50, "backbone.encoder.stages.layers.blocks.{}.depthwise.convolution"),
}


@pytest.mark.parametrize("widths", CROWDED.values(), ids=CROWDED)
def test_names_of_layers_and_stages_do_not_overlap(widths: list[LayerWidth], tmp_path: Path) -> None:
    axes = plots.plot_widths(widths, tmp_path / "plot.png")
    stages = [text for text in axes.texts if "×" in text.get_text()]
    shares = [text for text in axes.texts if "×" not in text.get_text()]
    assert len(stages) >= 3
    for texts in (stages, shares, [label for label in axes.get_xticklabels() if label.get_text()]):
        places = [text.get_window_extent() for text in texts]
        assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(places))
    assert all(len(label) <= 32 for label in _ticks(axes))


def test_a_long_name_keeps_both_ends() -> None:
    axes = plots.plot_widths(
        [LayerWidth("decoder.stages.left.blocks.17.convolution", "Conv2d", "8×8", (4, 2))], _axes()
    )
    assert _ticks(axes) == ["decoder.stages.…s.17.convolution"]


def test_the_legend_of_widths_stands_above_all_bars(tmp_path: Path) -> None:
    axes = plots.plot_widths(_layers([20]), tmp_path / "plot.png")
    highest = max(text.get_window_extent().y1 for text in axes.texts if text.get_text() == "50%" and text.xy[1] > 1)
    assert axes.get_legend().get_window_extent().y0 > highest
