"""Ranges: which values have them, how observers find them, what they refuse."""

from __future__ import annotations

import builtins
import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.errors import InputError, PlanError, SpecError, UsageError
from fxprune.quantization import OBSERVERS, Range, Ranges, calibrate, observers
from fxprune.runtime.int8 import Affine
from tests.quantization.nets import Mixed, Mlp, call, quantised


def _graph(model: nn.Module | None = None) -> fx.GraphModule:
    torch.manual_seed(0)
    return fxprune.trace((Mlp() if model is None else model).eval(), torch.randn(2, 6, 8))


def _ranges(observer: str, *batches: Tensor) -> Range:
    """Return what an observer finds for the input of a linear layer."""
    graph = call(lambda net, x: net.a(x), a=nn.Linear(8, 8))
    return calibrate(graph, batches, observer=observer).by_name["x"]


def test_all_values_that_may_be_needed_have_ranges() -> None:
    graph = _graph(Mixed())
    ranges = calibrate(graph, [torch.randn(2, 6, 8)])
    names = {"x", "stem", "act", "attention_norm", "mlp_fc1", "mlp_act", "add_2", "relu", "add_3", "getitem"}
    assert names <= ranges.by_name.keys()
    assert not {"head", "attention_q", "mlp_drop"} & ranges.by_name.keys()


def test_the_range_of_everything() -> None:
    batches = [torch.randn(3, 6, 8) for _ in range(3)]
    found = _ranges("min-max", *batches)
    assert found == Range(min(float(x.min()) for x in batches), max(float(x.max()) for x in batches))


def test_a_percentile_leaves_out_what_is_rare() -> None:
    many = torch.cat([torch.linspace(-1, 3, 47_999), torch.tensor([900.0])]).view(-1, 6, 8)
    found = _ranges("percentile", many)
    assert found.low == pytest.approx(-1, abs=0.5)
    assert found.high == pytest.approx(3, abs=0.5)
    few = torch.randn(3, 6, 8)
    assert _ranges("percentile", few) == Range(*(float(bound) for bound in few.aminmax()))


def test_a_histogram_has_less_squared_error_than_the_whole_range() -> None:
    values = torch.cat([torch.linspace(-1, 1, 48 * 40_000 - 1), torch.tensor([9.0])]).view(-1, 6, 8)

    def error(found: Range) -> float:
        return float((found.affine.dequantize(found.affine.quantize(values)) - values).square().mean())

    assert error(_ranges("histogram", values)) < 0.5 * error(_ranges("min-max", values))


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
@pytest.mark.parametrize("value", [0.0, 2.5, -1e-20])
def test_constant_values(observer: str, value: float) -> None:
    found = _ranges(observer, torch.full((2, 6, 8), value), torch.full((1, 6, 8), value))
    assert found.affine.dequantize(found.affine.quantize(torch.full((3,), value))).tolist() == pytest.approx(
        [value] * 3
    )


@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30))
def test_zero_is_a_level_of_every_range(a: float, b: float) -> None:
    found = Range(min(a, b), max(a, b))
    affine = found.affine
    assert 0 <= affine.zero_point <= 255
    assert affine.scale * (255 - affine.zero_point) >= min(found.high, 1e30) - affine.scale
    assert -affine.scale * affine.zero_point <= max(found.low, -1e30) + affine.scale
    levels = affine.quantize(torch.tensor([0.0]))
    assert levels.tolist() == [affine.zero_point]


def test_ranges_are_rows() -> None:
    ranges = calibrate(_graph(), [torch.randn(2, 6, 8)], observer="min-max")
    again = Ranges.of_rows("min-max", json.loads(json.dumps(ranges.as_rows())))
    assert again == ranges
    assert Range(0.0, 0.0).affine == Affine(1.0, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"value": "x", "low": 1.0}, "is no range"),
        ({"value": "x", "low": 1.0, "high": 0.0}, "'x' is 1.0 … 0.0"),
        ({"value": "x", "low": "a", "high": 0.0}, "is no range"),
        ({"value": "x", "low": float("nan"), "high": 0.0}, "finite"),
    ],
)
def test_bad_rows(row: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Ranges.of_rows("min-max", [row])


def test_batches_of_every_form() -> None:
    graph, x = _graph(), torch.randn(4, 6, 8)
    expected = calibrate(graph, [x])
    labelled = DataLoader(TensorDataset(x, torch.zeros(4)), batch_size=4)
    for batches in ([(x,)], [{"x": x}], [fxprune.Inputs((x,))], [[x, 0]], [(x, torch.zeros(4))], labelled, iter([x])):
        assert calibrate(graph, batches) == expected


def test_other_batches_and_sizes_than_the_example() -> None:
    assert calibrate(_graph(), [torch.randn(1, 6, 8), torch.randn(7, 9, 8)]).by_name["x"].high > 0


def test_calibration_changes_nothing() -> None:
    graph = _graph(Mixed())
    before, state = fxprune.dump(graph), copy.deepcopy(graph.state_dict())
    calibrate(graph, [torch.randn(2, 6, 8)])
    assert fxprune.dump(graph) == before
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in graph.parameters())


def _nan() -> Tensor:
    return torch.full((2, 6, 8), float("nan"))


def _diverging() -> fx.GraphModule:
    return call(lambda net, x: net.b((net.a(x) * 1e38) ** 2), a=nn.Linear(8, 8), b=nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("graph", "batches", "message"),
    [
        (_graph, [], "no batch was given to calibrate on"),
        (_graph, iter(()), "no batch was given to calibrate on"),
        (_graph, [torch.randn(2, 6, 8), _nan()], "batch 1 of the calibration holds NaN or infinity"),
        (_graph, [_nan() - float("inf")], "batch 0 of the calibration holds NaN or infinity"),
        (_diverging, [torch.randn(2, 6, 8)], r"makes '.*pow.*' \(%pow_1\) give NaN or infinity"),
        (_graph, [torch.randn(2, 6, 9)], r"x f32\[2, 6, 9\], does not run: at 'fc1' .*traced with x f32\[2, 6, 8\]"),
        (_graph, ["images"], "example inputs of type str"),
        (_graph, [{"image": torch.randn(2, 6, 8)}], r"do not fit the model: .*forward\(x"),
    ],
)
def test_bad_batches(graph: Callable[[], fx.GraphModule], batches: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        calibrate(graph(), batches)
    assert "While executing" not in str(caught.value)


def test_bad_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="unknown observer 'histogramm'; did you mean 'histogram'"):
        calibrate(_graph(), [torch.randn(2, 6, 8)], observer="histogramm")
    with pytest.raises(UsageError, match=r"training mode; call \.eval\(\)"):
        calibrate(_graph().train(), [torch.randn(2, 6, 8)])
    imported = builtins.__import__

    def without_torchao(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError("No module named 'torchao'")
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_torchao)
    observers._torchao.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'fxprune\[quantize\]'"):
        calibrate(_graph(), [torch.randn(2, 6, 8)])


def test_torchao_says_nothing(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    quantised(_graph())
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
