"""What quantised layers must give, by float64 arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxprune.graph.passes import Pipeline
from fxprune.quantization import Ranges, calibrate
from fxprune.runtime.int8 import Affine
from fxprune.runtime.int8.layer import Int8Layer
from passes import Quantization

__all__ = ["assert_computes_what_its_numbers_say"]

STEEPEST = 1.5
"""The slope of hard-swish at 3, which no other activation of the tests has."""


def assert_computes_what_its_numbers_say(graph: fx.GraphModule, x: Tensor) -> fx.GraphModule:
    """Quantise a graph; assert every layer's results and the graph's own, and that no layer stays in float."""
    ranges = calibrate(graph, [x], observer="min-max")
    module = Pipeline((Quantization(ranges=ranges),))(graph).graph_module
    noting = _Noted(module)
    with torch.no_grad():
        found, expected = noting.run(x), graph(x)
        layers = {path: noted[0] for path, noted in noting.noted.items()}
        simulated = _Simulated(copy.deepcopy(graph).double(), layers).run(x.double())
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    assert layers.keys() == {path for path in called if isinstance(graph.get_submodule(path), (nn.Linear, nn.Conv2d))}
    for path, noted in noting.noted.items():
        _assert_layer(graph, path, noted, ranges)
    peak = float(expected.abs().max())
    assert float((found - simulated).abs().max()) <= 0.1 * peak
    assert float((found - expected).abs().max()) <= 0.1 * peak
    return module


class _Noted(fx.Interpreter):
    """Notes what quantised layers take and give."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.noted: dict[str, tuple[Int8Layer, Tensor, Tensor]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        given = super().call_module(target, args, kwargs)
        layer = self.fetch_attr(target)
        if isinstance(layer, Int8Layer):
            self.noted[str(target)] = (layer, args[0], given)
        return given


class _Simulated(fx.Interpreter):
    """Runs a float graph in float64, its layers on the nearest of the levels that quantised ones take."""

    def __init__(self, module: fx.GraphModule, layers: dict[str, Int8Layer]) -> None:
        super().__init__(module)
        self.layers = layers

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        leaf = self.fetch_attr(target)
        if str(target) not in self.layers:
            return leaf(*args, **kwargs)
        return _sums(leaf, _nearest(args[0], self.layers[str(target)].source))


def _nearest(x: Tensor, affine: Affine) -> Tensor:
    levels = (x / affine.scale).round() + affine.zero_point
    return (levels.clamp(0, 255) - affine.zero_point) * affine.scale


def _sums(layer: Any, x: Tensor) -> Tensor:
    """Compute a layer in float64 with the nearest int8 weight."""
    weight = layer.weight.detach().double()
    rows = weight.flatten(1)
    steps = rows.abs().amax(1, keepdim=True) / 127
    nearest = ((rows / steps).round() * steps).reshape(weight.shape)
    bias = None if layer.bias is None else layer.bias.detach().double()
    if isinstance(layer, nn.Linear):
        return functional.linear(x, nearest, bias)
    return functional.conv2d(x, nearest, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _activation_behind(graph: fx.GraphModule, node: fx.Node) -> Any:
    """Return the only reader of a layer that is no identity, as a function."""
    while True:
        (node,) = node.users
        leaf: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        if not isinstance(leaf, (nn.Identity, nn.Dropout)):
            return leaf


def _assert_layer(graph: fx.GraphModule, path: str, noted: tuple[Int8Layer, Tensor, Tensor], ranges: Ranges) -> None:
    """What a layer gives is the nearest level, or the float, of what float64 makes of what it took."""
    layer, taken, given = noted
    (node,) = (node for node in graph.graph.nodes if node.target == path)
    expected = _sums(graph.get_submodule(path), (taken.double() - layer.source.zero_point) * layer.source.scale)
    slack = 1e-5 * float(expected.abs().max())
    if layer.table is not None:
        before = ranges.by_name[node.name]
        expected = expected.clamp(min(before.low, 0), max(before.high, 0))
        slack += STEEPEST * before.affine.scale / 2
    if layer.activation:
        expected = _activation_behind(graph, node)(expected)
    if layer.target is not None:
        assert given.dtype == torch.uint8
        low, high = (layer.target.scale * (level - layer.target.zero_point) for level in (0, 255))
        expected = expected.clamp(low, high)
        slack += layer.target.scale * (0.51 if layer.table is None else 1.01)
        given = (given.double() - layer.target.zero_point) * layer.target.scale
    assert float((given - expected).abs().max()) <= slack, path
