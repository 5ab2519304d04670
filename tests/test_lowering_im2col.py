"""Lowered models whose larger kernels compute on integers too, on patches; and models without compiled kernels."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import fxprune
from fxprune.lowering.measuring import FLOAT, FloatCall, LayerTimes, Stopwatch
from fxprune.plan import Plan, PlannedLowering
from fxprune.runtime import native
from fxprune.runtime.im2col import im2col
from fxprune.runtime.int8 import BlockSparseInt8Linear, Int8DepthwiseConv2d
from fxprune.runtime.int8.layer import Int8Layer


class Block(nn.Module):
    """Two convolutions and what goes around them, as a residual network has them."""

    def __init__(self, given: int, made: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(given, made, 3, stride, 1, bias=False), nn.BatchNorm2d(made)
        self.conv2, self.bn2 = nn.Conv2d(made, made, 3, padding=1, bias=False), nn.BatchNorm2d(made)
        self.act = nn.ReLU(inplace=True)
        self.around = nn.Identity() if stride == 1 else nn.Conv2d(given, made, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(y + self.around(x))


class Residual(nn.Module):
    """A stem of three channels, a pool, two blocks, a depthwise convolution between tables, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.pool = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1)
        self.first, self.second = Block(8, 8, 1), Block(8, 12, 2)
        self.wide, self.deep, self.act = (
            nn.Conv2d(12, 20, (1, 3)),
            nn.Conv2d(20, 20, 3, groups=20, padding=1),
            nn.SiLU(),
        )
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = self.act(self.wide(self.second(self.first(x))))
        return self.fc(self.act(self.deep(x)).mean((2, 3)))


IMAGE = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(1))
OTHERS = torch.rand(1, 3, 35, 29, generator=torch.Generator().manual_seed(2))

LARGER = ("stem", "first.conv1", "first.conv2", "second.conv1", "second.conv2", "wide")


def _build(seed: int = 0) -> Residual:
    torch.manual_seed(seed)
    return Residual().eval()


def _lower(model: nn.Module | None = None, **how: Any) -> fxprune.Result:
    options = {"calibration": [IMAGE], "backend": "native", "im2col": "*"} | how
    return fxprune.lower(_build() if model is None else model, IMAGE, **options)


def _planned(result: fxprune.Result) -> PlannedLowering:
    assert result.plan.lowering is not None
    return result.plan.lowering


def _runs(result: fxprune.Result) -> dict[str, str]:
    return {row.layer: row.runs for row in result.report.lowering}


def _kinds(module: fx.GraphModule, *paths: str) -> set[type[nn.Module]]:
    return {type(module.get_submodule(path)) for path in paths}


def _assert_replays(result: fxprune.Result, folder: Path) -> None:
    """Assert that plan and folder give the same graph and numbers, and that patches are gathered for integers only."""
    for node in result.module.graph.nodes:
        if node.target is im2col:
            assert {type(result.module.get_submodule(str(user.target))) for user in node.users} == {
                BlockSparseInt8Linear
            }
    again = fxprune.apply_plan(_build(), IMAGE, Plan.from_json(result.plan.to_json()))
    loaded = fxprune.load(fxprune.save(result, folder), _build(7))
    for found in (again, loaded):
        assert found.plan == result.plan
        assert fxprune.dump(found.module) == fxprune.dump(result.module)
        assert _runs(found) == _runs(result)
        for x in (IMAGE, OTHERS):
            assert torch.equal(found.module(x), result.module(x))


@pytest.mark.parametrize("how", [{}, {"backend": "reference"}, {"sparsity": 0.5, "layers": "all"}], ids=str)
def test_larger_kernels_compute_on_integers(how: dict[str, Any], tmp_path: Path) -> None:
    result = _lower(**how)
    assert _planned(result).im2col == LARGER
    assert _kinds(result.module, *LARGER) == {BlockSparseInt8Linear}
    assert FLOAT not in _runs(result).values()
    assert "conv1x1-to-linear{im2col=*},quantization" in result.plan.spec
    rows = {row.layer: row.shape for row in result.report.lowering}
    assert rows["stem"] == (2 * 12 * 16, 3 * 49, 8)
    expected = result.masked(IMAGE)
    assert (result.module(IMAGE) - expected).abs().max() < 0.1 * expected.abs().max()
    _assert_replays(result, tmp_path / "lowered")


def test_an_exported_program_computes_the_same(tmp_path: Path) -> None:
    result = _lower()
    program = torch.export.load(fxprune.save(result, tmp_path / "lowered", pt2=True) / "model.pt2").module()
    assert torch.equal(program(IMAGE), result.module(IMAGE))


def _clock(in_float: set[str]) -> Any:
    """Return what measures that some layers are faster in float."""

    def time(self: Stopwatch, node: fx.Node, layer: Int8Layer, floating: FloatCall) -> LayerTimes:  # noqa: ARG001
        path = str(node.target)
        assert (type(floating.layer) is nn.Conv2d) == (path in (*LARGER, "deep"))
        ours = "native" if isinstance(layer, Int8DepthwiseConv2d) else "native dense"
        return LayerTimes({FLOAT: 1.0 if path in in_float else 90.0, ours: 20.0}, 1.0, 1.0)

    return time


@pytest.mark.parametrize(
    "in_float",
    [{"first.conv1"}, {"stem", "second.conv2"}, {"stem", "wide", "second.around"}, set(LARGER), {*LARGER, "deep"}],
    ids=lambda paths: ",".join(sorted(paths)),
)
def test_a_convolution_that_is_faster_in_float_stays_one(
    in_float: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Stopwatch, "time", _clock(in_float))
    result = _lower(backend="auto")
    assert {path for path, runs in _runs(result).items() if runs == FLOAT} == in_float
    assert set(_planned(result).im2col) == set(LARGER) - in_float
    assert _kinds(result.module, *in_float - {"second.around"}) == {nn.Conv2d}
    assert all(row.reason.startswith("float is faster") for row in result.report.lowering if row.runs == FLOAT)
    _assert_replays(result, tmp_path / "lowered")


def test_larger_kernels_are_timed_against_their_convolutions(tmp_path: Path) -> None:
    result = _lower(backend="auto")
    rows = {row.layer: row for row in result.report.lowering}
    for path in LARGER:
        assert {FLOAT, "native dense"} <= rows[path].microseconds.keys()
        assert (rows[path].runs == FLOAT) == (path not in _planned(result).im2col)
        assert (rows[path].runs == FLOAT) == (_kinds(result.module, path) == {nn.Conv2d})
    _assert_replays(result, tmp_path / "lowered")


@pytest.mark.parametrize("some", [(), ("stem",), ("first.conv2", "wide"), ("second.*",), ("Conv2d",)], ids=str)
def test_ranges_do_not_depend_on_which_convolutions_are_linear(some: tuple[str, ...]) -> None:
    found, known = _planned(_lower(im2col=some)).ranges.by_name, _planned(_lower()).ranges.by_name
    for name, seen in found.items():
        assert (seen.low, seen.high) == pytest.approx((known[name].low, known[name].high), rel=1e-4, abs=1e-6)


class Twice(nn.Module):
    """A convolution that is called again, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.relu(self.stem(torch.relu(self.stem(x)))))


def _normed() -> nn.Module:
    model = _build()
    parametrizations.weight_norm(model.stem)
    return model


@pytest.mark.parametrize(
    ("how", "left", "reason"),
    [
        ({"exclude": "stem"}, {"stem"}, "it was excluded"),
        ({"layers": ["fc", "*.conv1"]}, {"stem", "first.conv2", "second.conv2", "wide"}, "it was not asked for"),
        ({"im2col": ["first", "wide"]}, {"stem", "second.conv1", "second.conv2"}, "no rule says how a Conv2d computes"),
        ({"model": Twice().eval()}, {"stem"}, "it is called 2 times"),
        ({"model": _normed()}, {"stem"}, "no rule says how a [A-Za-z]*Conv2d computes on uint8$"),
    ],
)
def test_convolutions_that_stay_in_float_stay_convolutions(how: dict[str, Any], left: set[str], reason: str) -> None:
    result = _lower(**how)
    rows = {row.layer: row for row in result.report.lowering}
    assert {path for path in LARGER if path in rows and rows[path].runs == FLOAT} == left
    assert not left & set(_planned(result).im2col)
    for path in left:
        assert isinstance(result.module.get_submodule(path), nn.Conv2d)
        assert re.match(reason, rows[path].reason)


def test_a_layer_that_a_plan_moves_to_float_is_a_convolution_again() -> None:
    result = _lower()
    planned = _planned(result)
    layers = {path: runs for path, runs in planned.layers.items() if path != "wide"}
    edited = dataclasses.replace(planned, layers=layers, floating={"wide": "as I like"})
    again = fxprune.apply_plan(_build(), IMAGE, dataclasses.replace(result.plan, lowering=edited))
    assert _kinds(again.module, "wide") == {nn.Conv2d}
    assert _planned(again).im2col == tuple(path for path in LARGER if path != "wide")
    assert {row.layer: row.reason for row in again.report.lowering}["wide"] == "as I like"


def test_a_model_without_larger_kernels_has_none_to_compute() -> None:
    result = _lower(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)).eval())
    assert _planned(result).im2col == ()
    assert _runs(result) == {"0": "native dense", "2": "native"}


def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "there is no compiler")


@pytest.mark.parametrize("backend", ["native", "auto"])
def test_depthwise_convolutions_stay_in_float_without_kernels(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched:
        _without_kernels(patched)
        result = _lower(backend=backend)
    assert _runs(result)["deep"] == FLOAT
    assert "deep" in _planned(result).floating
    assert "quantization{depthwise=False}" in result.plan.spec
    assert "depthwise convolutions stay in float: there is no compiler" in result.report.notes
    _assert_replays(result, tmp_path / "lowered")


def test_a_machine_without_kernels_replays_what_one_with_them_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _lower()
    assert _planned(result).layers["deep"] == "native"
    assert not any("no compiler" in note for note in result.report.notes)
    _without_kernels(monkeypatch)
    again = fxprune.apply_plan(_build(), IMAGE, result.plan)
    assert fxprune.dump(again.module) == fxprune.dump(result.module)
    assert torch.equal(again.module(IMAGE), result.module(IMAGE))
