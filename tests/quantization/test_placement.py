"""Where values become uint8: named cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import fxprune
from fxprune.quantization import float_layers
from tests.quantization.nets import Attention, Mixed, Mlp, Residual, call, counts, layers, quantised


def _graph(model: nn.Module) -> fx.GraphModule:
    torch.manual_seed(0)
    return fxprune.trace(model.eval(), torch.randn(2, 6, 8))


def _linear(inputs: int = 8, outputs: int = 8) -> nn.Linear:
    return nn.Linear(inputs, outputs)


@pytest.mark.parametrize(
    ("model", "boundaries", "expected"),
    [
        (nn.Sequential(_linear(), nn.ReLU(), _linear()), (1, 0), {"0": "u8 relu", "2": "f32"}),
        (
            nn.Sequential(_linear(), nn.Hardtanh(-1, 2), nn.Dropout(), _linear()),
            (1, 0),
            {"0": "u8 hardtanh", "3": "f32"},
        ),
        (nn.Sequential(_linear(), nn.Hardswish()), (1, 1), {"0": "u8 hardswish"}),
        (nn.Sequential(_linear(), nn.ReLU6()), (1, 0), {"0": "f32 relu6"}),
        (nn.Sequential(_linear(), nn.LayerNorm(8), _linear()), (2, 0), {"0": "f32", "2": "f32"}),
        (Mlp(), (1, 0), {"fc1": "u8 gelu", "fc2": "f32"}),
        (Attention(), (2, 0), {"q": "f32", "k": "f32", "v": "f32", "out": "f32"}),
        (Residual(), (3, 0), {"a": "f32 relu", "b": "f32 relu6", "c": "f32"}),
        (Mixed(), (7, 1), {"head": "f32", "over_tokens": "u8 clamp", "stem": "u8 hardswish", "mlp.fc1": "u8 gelu"}),
    ],
    ids=["chain", "dropout", "table", "bounds", "norm", "mlp", "attention", "residual", "mixed"],
)
def test_boundaries(model: nn.Module, boundaries: tuple[int, int], expected: dict[str, str]) -> None:
    module = quantised(_graph(model))
    assert counts(module) == boundaries, fxprune.dump(module)
    assert layers(module).items() >= expected.items()


def _abc() -> dict[str, nn.Module]:
    return {name: _linear() for name in "abc"}


def _split(net: Any, x: Tensor) -> Tensor:
    left, right = net.a(x).chunk(2, 1)
    return net.b(left) * net.c(right)


def _split_unevenly(net: Any, x: Tensor) -> Tensor:
    left, right = torch.sin(x).chunk(2, 1)
    return net.b(left) * right


@pytest.mark.parametrize(
    ("function", "boundaries", "gives"),
    [
        (lambda net, x: net.b(net.a(x).transpose(0, 1).contiguous()[1:]), (1, 0), "u8"),
        (lambda net, x: net.b(net.a(x)) + net.c(net.a(x)), (2, 0), None),
        (_split, (1, 0), "u8"),
        (_split_unevenly, (1, 0), None),
        (lambda net, x: net.b(torch.sin(x)[:, ::2]) + net.c(torch.sin(x)[:, ::2]), (2, 0), None),
        (lambda net, x: net.b((y := torch.sin(x))[:, ::2]) + net.c(y)[:, ::2], (1, 0), None),
        (lambda net, x: net.b(y := net.a(x).sigmoid()) + net.c(y.flip(1)), (2, 1), "u8 sigmoid"),
        (lambda net, x: net.b(y := net.a(x)).view(y.size(0), y.shape[1], 8), (1, 0), "u8"),
        (lambda net, x: net.b(functional.max_pool2d(net.a(x), (2, 1))), (2, 0), "f32"),
        (lambda net, x: net.b(functional.dropout(net.a(x), 0.0)), (2, 0), "f32"),
        (lambda net, x: (net.b(y := net.a(x)), y), (2, 0), "f32"),
        (lambda net, x: net.a(x).softmax(-1), (1, 0), "f32"),
        (lambda net, x: net.b(torch.where(net.a(x) > 0, x, -x)), (2, 0), "f32"),
        (lambda net, x: net.b(net.a(x)[x[:, 0, 0].argsort()]), (1, 0), "u8"),
    ],
    ids=[
        *(
            "moves",
            "called-twice",
            "split",
            "half",
            "two-slices",
            "slice-and-whole",
            "table",
            "sizes",
            "pool",
            "dropping",
            "returned",
        ),
        *("softmax", "condition", "index"),
    ],
)
def test_moves_and_readers(function: Callable[..., Any], boundaries: tuple[int, int], gives: str | None) -> None:
    graph = call(function, **_abc())
    module = quantised(graph)
    assert counts(module) == boundaries, fxprune.dump(module)
    assert layers(module).get("a") == gives


def _written(net: Any, x: Tensor) -> Tensor:
    y = torch.sin(x)
    z = y.transpose(1, 2).relu_()
    return net.b(y) + z.transpose(1, 2)


def _activated_in_place(net: Any, x: Tensor) -> Tensor:
    y = functional.hardswish(net.a(x))
    y += net.b(y)
    return net.c(y)


def _set(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    y[:, 0] = 0
    return net.b(y)


def _written_again(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    z = y.add_(1)
    b = net.b(z)
    y.mul_(3)
    return b + net.c(z)


def _written_elsewhere(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    torch.mul(x, 0.5, out=y)
    return net.b(y)


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        *((_written, {"b"}), (_activated_in_place, {"b"}), (_set, {"b"})),
        *((_written_again, {"b", "c"}), (_written_elsewhere, {"b"})),
    ],
    ids=["view", "add", "item", "again", "out"],
)
def test_what_is_written_into_is_not_quantised(function: Callable[..., Any], kept: set[str]) -> None:
    graph = call(function, **_abc())
    module = quantised(graph)
    reasons = dict(float_layers(module))
    assert reasons.keys() == kept
    assert all("is written into in place" in reason for reason in reasons.values())
    x = torch.randn(3, 6, 8)
    assert float((module(x) - graph(x)).abs().max()) < 0.05


def test_a_fused_activation_may_write_in_place() -> None:
    model = nn.Sequential(_linear(), nn.ReLU(inplace=True), _linear(), nn.Hardswish(inplace=True), _linear())
    module = quantised(_graph(model))
    assert layers(module) == {"0": "u8 relu", "2": "u8 hardswish", "4": "f32"}
