"""Plots: what they draw, where they write it, and what they refuse."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxprune import plots
from fxprune.errors import ArtifactError, FxpruneError, InputError, SpecError, UsageError
from fxprune.gating.trail import GateTrail
from fxprune.insights.profile import LayerProfile, SparsityProfile
from fxprune.insights.sensitivity import LayerSensitivity, Sensitivity
from tests.plots.samples import TRAIL, WIDTHS

figures = pytest.importorskip("matplotlib.figure")

PROFILE = SparsityProfile(
    (
        LayerProfile("stem", "other", 1, 0.0, (400, 400)),
        LayerProfile("expand", "expansion", 2, 0.5, (200, 100)),
        LayerProfile("reduce", "squeeze-excite", 3, 0.9, (20, 2)),
        LayerProfile("project", "bottleneck", 4, 0.25, (100, 75)),
        LayerProfile("classifier", "other", 5, 0.75, (40, 10)),
    )
)

FOUND = Sensitivity(
    "top-1",
    76.0,
    0.95,
    "1x4",
    (
        LayerSensitivity("a", "expansion", 0.95, 70.0, 6.0),
        LayerSensitivity("b", "expansion", 0.95, 40.0, 36.0),
        LayerSensitivity("c", "bottleneck", 0.95, 30.0, 46.0),
    ),
)

TRACES = {"learned thresholds": [(0.9, 60.0), (0.5, 75.0)], "magnitude": [(0.5, 70.0)]}

WEIGHTS = torch.tensor([[0.1, -0.2], [0.3, 0.0]])
PRUNED = torch.tensor([[0.0, -0.25], [0.35, 0.0]])

DRAWN: dict[str, Any] = {
    "sparsity": lambda target: plots.plot_sparsity(PROFILE, target),
    "MACs by role": lambda target: plots.plot_macs_by_role(PROFILE, target),
    "sensitivity": lambda target: plots.plot_sensitivity(FOUND, target),
    "trace": lambda target: plots.plot_trace(TRACES, target),
    "pruned weights": lambda target: plots.plot_pruned_weights(WEIGHTS, PRUNED, target, threshold=0.01),
    "widths": lambda target: plots.plot_widths(WIDTHS, target),
}

WRITTEN = DRAWN | {"gates": lambda target: plots.plot_gates(TRAIL, target)}


def _axes() -> Any:
    return figures.Figure().add_subplot()


@pytest.mark.parametrize("draw", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_files_are_written_without_a_display(
    draw: Any, suffix: str, magic: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    path = tmp_path / f"plot{suffix}"
    draw(path)
    assert path.read_bytes().startswith(magic)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums(), "no global state"


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_axes_that_are_given_are_drawn_in(draw: Any) -> None:
    axes = _axes()
    assert draw(axes) is axes
    assert axes.has_data()


@pytest.mark.parametrize("draw", WRITTEN.values(), ids=WRITTEN)
def test_a_plot_drawn_twice_is_the_same(draw: Any, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw(str(tmp_path / name))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def _heights(axes: Any) -> list[float]:
    return [round(bar.get_height(), 6) for bar in axes.patches]


def _ticks(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def test_sparsity_is_drawn_of_1x1_convolutions_and_what_else_is_sparse() -> None:
    axes = plots.plot_sparsity(PROFILE, _axes())
    assert _ticks(axes) == ["expand", "reduce", "project", "classifier"]
    bars = {(round(bar.get_center()[0]), round(bar.get_height())) for bar in axes.patches}
    assert bars == {(0, 50), (1, 90), (2, 25), (3, 75)}
    assert axes.get_legend_handles_labels()[1] == ["expansion", "bottleneck", "squeeze-excite", "other"]


def test_many_layers_are_named_as_far_as_legible() -> None:
    many = SparsityProfile(tuple(LayerProfile(f"layer{i}", "expansion", i, 0.5, (2, 1)) for i in range(150)))
    axes = plots.plot_sparsity(many, _axes())
    assert len(axes.patches) == 150
    assert _ticks(axes)[:2] == ["layer0", "layer4"]
    assert len(_ticks(axes)) <= 40


def test_macs_are_drawn_before_and_after() -> None:
    axes = plots.plot_macs_by_role(PROFILE, _axes())
    assert _heights(axes) == [x / 1e6 for x in (200, 100, 20, 440, 100, 75, 2, 410)]
    assert _ticks(axes)[0] == "expansion\n1 layer\n50.0% left"
    assert _ticks(axes)[3] == "other\n2 layers\n93.2% left"


def test_sensitivity_is_drawn_as_a_box_and_points_for_each_role() -> None:
    axes = plots.plot_sensitivity(FOUND, _axes())
    points = [sorted(value for _, value in column.get_offsets()) for column in axes.collections]
    assert points == [[40.0, 70.0], [30.0]]
    assert _ticks(axes) == ["expansion\n2 layers", "bottleneck\n1 layer"]
    assert [text.get_text() for text in axes.texts] == ["b", "c"], "the most sensitive of each role is named"
    assert any(list(line.get_ydata()) == [76.0, 76.0] for line in axes.lines)


def test_traces_are_drawn_in_the_order_of_sparsity() -> None:
    axes = plots.plot_trace(TRACES, _axes(), metric="accuracy")
    assert list(axes.lines[0].get_xdata()) == [50.0, 90.0]
    assert list(axes.lines[0].get_ydata()) == [75.0, 60.0]
    assert [line.get_label() for line in axes.lines] == list(TRACES)
    assert axes.get_ylabel() == "accuracy"


def test_pruned_weights_are_squared_and_parted_by_the_threshold() -> None:
    axes = plots.plot_pruned_weights(WEIGHTS, PRUNED, _axes(), threshold=0.01)
    drawn = {(round(x, 4), round(y, 4)) for x, y in axes.collections[0].get_offsets()}
    assert drawn == {(0.01, 0.0), (0.04, 0.0625), (0.09, 0.1225), (0.0, 0.0)}
    upright, level = axes.lines
    assert list(upright.get_xdata()) == list(level.get_ydata()) == [0.01, 0.01]


def test_of_many_weights_some_are_drawn() -> None:
    weights = torch.rand(200, 300, requires_grad=True)
    axes = plots.plot_pruned_weights(weights, weights, _axes())
    assert len(axes.collections[0].get_offsets()) == 20_000
    assert not axes.lines


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"plots need matplotlib: pip install 'fxprune\[plots\]'"):
        plots.plot_sparsity(PROFILE, tmp_path / "plot.png")


UNSEEN = GateTrail((), {}, (), {})
BROKEN = GateTrail((0,), {"orbit_0": torch.full((1, 2), torch.nan)}, (1.0,), {"orbit_0": ("stem",)})
NOTHING = Sensitivity("top-1", 76.0, 0.95, "1x4", ())

BAD_INPUT: list[tuple[Any, type[FxpruneError], str]] = [
    (lambda path: plots.plot_sparsity(PROFILE, path.with_suffix(".jpg")), SpecError, r"ends in \.png, \.svg, \.pdf"),
    (lambda path: plots.plot_sparsity(PROFILE, path / "none" / "a.png"), ArtifactError, "cannot write the plot"),
    (lambda path: plots.plot_sparsity(SparsityProfile(PROFILE.layers[:1]), path), InputError, "no 1×1 convolution"),
    (lambda path: plots.plot_macs_by_role(SparsityProfile(()), path), InputError, "no layers"),
    (lambda path: plots.plot_sensitivity(NOTHING, path), InputError, "no layer was evaluated"),
    (lambda path: plots.plot_trace({"magnitude": []}, path), InputError, "no points"),
    (lambda path: plots.plot_pruned_weights(WEIGHTS, PRUNED[0], path), InputError, r"shapes \(2, 2\) and \(2,\)"),
    (lambda path: plots.plot_pruned_weights(0 * WEIGHTS, 0 * PRUNED, path), InputError, "all zero"),
    (lambda path: plots.plot_pruned_weights(WEIGHTS / 0, PRUNED, path), InputError, "not finite"),
    (lambda path: plots.plot_widths((), path), InputError, "no layer that makes channels"),
    (lambda path: plots.plot_gates(UNSEEN, path), InputError, "no steps or no gates"),
    (lambda path: plots.plot_gates(BROKEN, path), InputError, "probabilities that are not finite"),
    (lambda path: plots.plot_gates(TRAIL, path.with_suffix(".gif")), SpecError, "cannot draw to"),
]


@pytest.mark.parametrize(("draw", "kind", "message"), BAD_INPUT, ids=[row[2] for row in BAD_INPUT])
def test_what_cannot_be_drawn_is_refused(draw: Any, kind: type[FxpruneError], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        draw(tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
