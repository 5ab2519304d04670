"""Activations that the layer before them can compute itself: by its bounds, exactly, or by a table of 256 levels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxprune.graph.hooks import is_hooked
from fxprune.quantization.ranges import Range
from fxprune.runtime.weight_masks import class_of

__all__ = ["Activation", "find_activation", "trimmed"]


@dataclass(frozen=True)
class Activation:
    """A pointwise function of one value, with its options bound.

    Attributes:
        name: what torch calls it.
        function: float tensor → float tensor.
        bounds: low and high where it is a clamp, None otherwise.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    bounds: tuple[float, float] | None = None


_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardtanh: "hardtanh",
    nn.CELU: "celu",
    nn.ELU: "elu",
    nn.GELU: "gelu",
    nn.Hardshrink: "hardshrink",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Hardswish: "hardswish",
    nn.LeakyReLU: "leaky_relu",
    nn.LogSigmoid: "logsigmoid",
    nn.Mish: "mish",
    nn.SELU: "selu",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Softplus: "softplus",
    nn.Softshrink: "softshrink",
    nn.Softsign: "softsign",
    nn.Tanh: "tanh",
    nn.Tanhshrink: "tanhshrink",
}

_NAMES = (*_MODULES.values(), "clamp", "clip", "clamp_min", "clamp_max")

_FUNCTIONS: dict[Any, str] = {
    getattr(home, spelled): name
    for name in _NAMES
    for spelled in (name, f"{name}_")
    for home in (torch, functional)
    if hasattr(home, spelled)
}

_METHODS = {spelled: name for name in _NAMES for spelled in (name, f"{name}_") if hasattr(Tensor, spelled)}


def _clamp(min: float | None = None, max: float | None = None) -> tuple[float, float]:  # noqa: A002
    return -math.inf if min is None else min, math.inf if max is None else max


_BOUNDS: dict[str, Callable[..., tuple[float, float]]] = {
    "relu": lambda inplace=False: (0.0, math.inf),  # noqa: ARG005
    "relu6": lambda inplace=False: (0.0, 6.0),  # noqa: ARG005
    "hardtanh": lambda min_val=-1.0, max_val=1.0, inplace=False: (min_val, max_val),  # noqa: ARG005
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": lambda min: _clamp(min),  # noqa: A006
    "clamp_max": lambda max: _clamp(None, max),  # noqa: A006
}
"""By activation: the options that it takes → low and high."""


def find_activation(module: fx.GraphModule, node: fx.Node) -> Activation | None:
    """Return the activation that a node computes of its first argument; None for anything else."""
    if not node.args or not isinstance(node.args[0], fx.Node) or len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_module":
        return _of_module(module.get_submodule(str(node.target))) if len(node.args) == 1 and not node.kwargs else None
    options, named = node.args[1:], dict(node.kwargs)
    if not all(value is None or isinstance(value, (bool, int, float, str)) for value in (*options, *named.values())):
        return None
    if node.op == "call_function" and node.target in _FUNCTIONS:
        called: Any = node.target
        return _activation(_FUNCTIONS[called], lambda x: called(x, *options, **named), *options, **named)
    if node.op == "call_method" and node.target in _METHODS:
        method = str(node.target)
        return _activation(_METHODS[method], lambda x: getattr(x, method)(*options, **named), *options, **named)
    return None


def _of_module(leaf: nn.Module) -> Activation | None:
    name = _MODULES.get(class_of(leaf))
    if name is None or is_hooked(leaf):
        return None
    options = (leaf.min_val, leaf.max_val) if isinstance(leaf, nn.Hardtanh) and name == "hardtanh" else ()
    return _activation(name, copy.deepcopy(leaf), *options)


def _activation(name: str, function: Callable[[Tensor], Tensor], *options: Any, **named: Any) -> Activation | None:
    if name not in _BOUNDS:
        return Activation(name, function)
    low, high = _BOUNDS[name](*options, **named)
    return Activation(name, function, (float(low), float(high))) if low <= high else None


_POINTS = 4097


def trimmed(function: Callable[[Tensor], Tensor], before: Range, after: Range) -> Range:
    """Leave out of the range before an activation what it makes constant, to within half a level of its result.

    That is where it is flat, as hard-swish is below −3, and where its result leaves the range that results have.

    >>> trimmed(nn.functional.hardswish, Range(-40.0, 8.0), Range(-0.375, 6.0)).low > -3.1
    True
    """
    points = torch.linspace(before.low, before.high, _POINTS, dtype=torch.float64)
    half = after.affine.scale / 2
    results = function(points.float()).double().clamp(min(after.low, 0.0), max(after.high, 0.0))
    first, last = _constant(results, half), _constant(results.flip(0), half)
    if first == _POINTS:
        return before
    return Range(float(points[first - 1]), float(points[_POINTS - last]))


def _constant(values: Tensor, spread: float) -> int:
    """Return how many of the first values differ by no more than `spread`."""
    return int((values.cummax(0).values - values.cummin(0).values <= spread).sum())
