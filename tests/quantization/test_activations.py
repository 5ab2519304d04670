"""Activations that a layer computes: which, with which numbers, and how exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxprune.quantization import Range
from fxprune.quantization.activations import find_activation, trimmed
from fxprune.runtime.int8 import Int8Linear
from tests.quantization.nets import call, counts, layers, quantised

EXACT = [
    (nn.ReLU(), "relu", (0, float("inf"))),
    (nn.ReLU6(inplace=True), "relu6", (0, 6)),
    (nn.Hardtanh(-0.5, 0.25), "hardtanh", (-0.5, 0.25)),
    (torch.relu, "relu", (0, float("inf"))),
    (lambda x: functional.relu6(x, inplace=True), "relu6", (0, 6)),
    (lambda x: functional.hardtanh(x, -0.25, max_val=0.5), "hardtanh", (-0.25, 0.5)),
    (lambda x: x.clamp(min=-0.125), "clamp", (-0.125, float("inf"))),
    (lambda x: torch.clamp(x, -0.125, 0.25), "clamp", (-0.125, 0.25)),
    (lambda x: x.clamp_max(0.375), "clamp_max", (float("-inf"), 0.375)),
    (lambda x: x.relu_(), "relu", (0, float("inf"))),
]

TABLES = [
    *((kind(), "") for kind in (nn.Hardswish, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Mish, nn.ELU)),
    *((kind(), "") for kind in (nn.CELU, nn.SELU, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Softshrink)),
    (nn.LeakyReLU(0.3), "leaky_relu"),
    (nn.GELU(approximate="tanh"), "gelu"),
    (nn.ELU(0.5), "elu"),
    (torch.sigmoid, "sigmoid"),
    (lambda x: functional.leaky_relu(x, negative_slope=0.2), "leaky_relu"),
    (lambda x: functional.silu(x, inplace=True), "silu"),
    (lambda x: x.tanh(), "tanh"),
]

OTHERS = [
    nn.PReLU(),
    nn.Softmax(-1),
    nn.GLU(),
    lambda x: x * 2,
    lambda x: x.clamp(min=x.mean()),
    lambda x: torch.relu(x) + x,
    lambda x: torch.clamp(x, 1.0, 0.0),
    nn.RReLU(),
]


Function = Callable[[Tensor], Tensor]


def _behind(activation: Function) -> fx.GraphModule:
    if isinstance(activation, nn.Module):
        return call(lambda net, x: net.act(net.a(x)), a=nn.Linear(8, 8), act=activation)
    return call(lambda net, x: activation(net.a(x)), a=nn.Linear(8, 8))


@pytest.mark.parametrize(("activation", "name", "bounds"), EXACT, ids=[str(name) for _, name, _ in EXACT])
def test_clamps_are_bounds(activation: Function, name: str, bounds: tuple[float, float]) -> None:
    graph, x = _behind(activation), torch.randn(64, 6, 8)
    module = quantised(graph, x, observer="min-max")
    layer = module.get_submodule("a")
    assert isinstance(layer, Int8Linear)
    assert (layer.low, layer.high, layer.table, layers(module)) == (*bounds, None, {"a": f"f32 {name}"})
    found = module(x)
    assert float(found.min()) >= bounds[0]
    assert float(found.max()) <= bounds[1]
    assert float((found - graph(x)).abs().max()) < 0.05


@pytest.mark.parametrize(("activation", "name"), TABLES, ids=[type(activation).__name__ for activation, _ in TABLES])
def test_others_are_tables(activation: Function, name: str) -> None:
    graph, x = _behind(activation), torch.randn(64, 6, 8)
    module = quantised(graph, x, observer="min-max")
    layer = module.get_submodule("a")
    assert isinstance(layer, Int8Linear)
    assert layer.table is not None
    assert layer.target is not None
    assert layer.activation == (name or type(activation).__name__.lower())
    assert counts(module) == (1, 1)
    levels = (module(x) - graph(x)).abs() / layer.target.scale
    assert float(levels.mean()) < 2


@pytest.mark.parametrize("activation", OTHERS, ids=lambda value: type(value).__name__)
def test_what_is_no_activation_stays(activation: Function) -> None:
    graph, x = _behind(activation), torch.randn(64, 6, 8)
    (node,) = (node for node in graph.graph.nodes if node.target == "a")
    assert len(node.users) > 1 or find_activation(graph, next(iter(node.users))) is None
    module = quantised(graph, x, observer="min-max")
    assert layers(module) == {"a": "f32"}
    assert float((module(x) - graph(x)).detach().abs().max()) < 0.1


@pytest.mark.parametrize(
    ("function", "before", "after", "expected"),
    [
        (functional.hardswish, Range(-40, 6), Range(-0.375, 6), Range(-3.1, 6)),
        (functional.silu, Range(-100, 10), Range(-0.28, 10), Range(-5.6, 10)),
        (torch.sigmoid, Range(-50, 50), Range(0, 1), Range(-6.3, 6.3)),
        (torch.sigmoid, Range(-50, 50), Range(0, 0.5), Range(-7, 0.1)),
        (torch.tanh, Range(-1, 1), Range(-0.76, 0.76), Range(-1, 1)),
        (functional.leaky_relu, Range(-4, 4), Range(-0.04, 4), Range(-3.2, 4)),
        (torch.relu, Range(-4, -1), Range(0, 0), Range(-4, -1)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_an_activation_makes_constant_is_trimmed(
    function: Function, before: Range, after: Range, expected: Range
) -> None:
    found = trimmed(function, before, after)
    assert before.low <= found.low <= found.high <= before.high
    assert found.low == pytest.approx(expected.low, abs=0.5)
    assert found.high == pytest.approx(expected.high, abs=0.5)
    everywhere = torch.linspace(before.low, before.high, 10_000)
    kept = everywhere.clamp(found.low, found.high)
    change = function(kept).clamp(after.low, after.high) - function(everywhere).clamp(after.low, after.high)
    assert float(change.abs().max()) <= after.affine.scale * 0.51
