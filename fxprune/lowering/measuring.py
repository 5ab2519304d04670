"""Times what could compute a quantised layer on this machine: our kernels, oneDNN's, and the float layer itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxprune.latency import time_in_turn
from fxprune.lowering.choices import DENSE, Choice, zero_blocks
from fxprune.runtime import native
from fxprune.runtime.im2col import im2col
from fxprune.runtime.int8 import CHANNELS_LAST, PACKED, BlockSparseInt8Linear, Int8Linear, pack, quantize
from fxprune.runtime.int8.backends import refusal
from fxprune.runtime.int8.layer import Int8Layer

__all__ = ["FLOAT", "OURS", "FloatCall", "LayerTimes", "Stopwatch"]

FLOAT = "float"
"""What the layer is called that computes in float32."""

OURS = "native"
"""What a quantised layer is called that only our kernels compute."""

_BUDGET = 8.0
"""Milliseconds for one shape, of which every candidate runs five times at least and forty times at most."""

_FEWEST, _MOST = 5, 40


@dataclass(frozen=True)
class LayerTimes:
    """Microseconds of one call of a layer.

    Attributes:
        choices: by candidate: choices as they are spelled, and `FLOAT`.
        entering: of quantising its input.
        leaving: of quantising its output, or of turning that into float32, which takes as long.
    """

    choices: Mapping[str, float]
    entering: float
    leaving: float

    @property
    def best(self) -> str | None:
        """The fastest candidate that computes on uint8; None where no kernel runs here."""
        return min((name for name in self.choices if name != FLOAT), key=self.choices.__getitem__, default=None)


class FloatCall(NamedTuple):
    """A layer in float, without its activation, and a value of the kind that it is called with."""

    layer: nn.Module
    given: Tensor

    @staticmethod
    def of_graph(floats: fx.GraphModule) -> dict[str, FloatCall]:
        """Return path → call of the layers that a graph calls on one value."""
        nodes = [node for node in floats.graph.nodes if node.op == "call_module" and len(node.all_input_nodes) == 1]
        given = {str(node.target): node.all_input_nodes[0].meta["val"] for node in nodes}
        return {path: FloatCall(floats.get_submodule(path), value) for path, value in given.items()}


class Stopwatch:
    """Times layers, equal ones once.

    `block` is the form of sparse weights, as "1x4".
    """

    def __init__(self, block: str) -> None:
        self.block = block
        self.known: dict[Any, LayerTimes] = {}
        native.load()  # before any layer is timed: what has no backends to choose from takes what is loaded

    def time(self, node: fx.Node, layer: Int8Layer, floating: FloatCall) -> LayerTimes:
        """Time what could compute a call; on patches, gathering them counts too.

        Args:
            node: the call of the quantised layer.
            layer: that layer.
            floating: what is called where it stays in float.
        """
        calls = _Calls(layer, node, floating, self.block)
        if calls.kind not in self.known:
            self.known[calls.kind] = _timed(calls.all())
        return self.known[calls.kind]


class _Calls:
    """What is timed of the call of a quantised layer."""

    def __init__(self, layer: Int8Layer, node: fx.Node, floating: FloatCall, block: str) -> None:
        source = node.all_input_nodes[0]
        self.window = source.args[1:] if source.target is im2col else ()
        self.layer, self.floating, self.block = layer, floating, block
        self.given: Tensor = (source.all_input_nodes[0] if self.window else source).meta["val"]
        self.made: Tensor = node.meta["val"]
        self.zeros = zero_blocks(layer.weight, block) if isinstance(layer, Int8Linear) else 0.0
        gives_packed = layer.target is not None and all(user.target is not im2col for user in node.users)
        self.output_layout = PACKED if gives_packed else CHANNELS_LAST

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the times depend on."""
        values = tuple((value.shape, value.stride()) for value in (self.given, self.floating.given))
        weight = (round(self.zeros, 2), str(self.floating.layer), str(self.window))
        behind = (self.layer.dtype, self.layer.table is not None, self.layer.activation, self.output_layout)
        return (*values, self.made.shape, *weight, *behind)

    def all(self) -> dict[str, Callable[[], Any]]:
        """Return all candidates, and the two conversions."""
        levels = _random_levels(self.given, torch.uint8)
        numbers = _random_levels(self.floating.given, torch.float32)
        values = (numbers - self.layer.source.zero_point) * self.layer.source.scale
        layout = PACKED if isinstance(self.layer, Int8Linear) else CHANNELS_LAST
        entering = CHANNELS_LAST if self.window else layout
        return {
            FLOAT: partial(_in_float, self.floating.layer, self.layer.activation, values),
            **self._on_levels(levels),
            "entering": partial(quantize, _as_rows(self.given), 1.0, 0, entering),
            "leaving": partial(quantize, _as_rows(self.made), 1.0, 0, layout),
        }

    def _on_levels(self, levels: Tensor) -> dict[str, Callable[[], Any]]:
        """Return the candidates that compute on uint8 and run here."""
        if not isinstance(self.layer, Int8Linear):
            return {OURS: partial(self.layer, levels)}
        forms = {"native": [self.block, DENSE] if self.zeros else [DENSE], "onednn": [DENSE]}
        choices = [Choice(backend, form) for backend, found in forms.items() for form in found]
        lowered = {str(choice): choice.lower(self.layer) for choice in choices}
        able = {name: layer for name, layer in lowered.items() if not refusal(layer.backend, layer.block, layer.dtype)}
        return {name: self._run(layer, levels) for name, layer in able.items()}

    def _run(self, layer: BlockSparseInt8Linear, levels: Tensor) -> Callable[[], Any]:
        """Return the call of a layer with values as it reads them best, on patches channels-last; let it do so."""
        is_ours = layer.backend == "native"
        layer.output_layout = self.output_layout if is_ours else CHANNELS_LAST
        if self.window:
            return lambda: layer(im2col(levels, *self.window))
        layer.input_layout = PACKED if is_ours else CHANNELS_LAST
        return partial(layer, pack(levels) if is_ours else levels)


def _random_levels(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers in 0 … 255 that lie in memory as a meta value does."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.empty_like(like, dtype=dtype, device="cpu")
    return levels.copy_(torch.randint(0, 256, like.shape, generator=generator))


def _as_rows(value: Tensor) -> Tensor:
    """Return floats that lie like a value, as one that is quantised."""
    return torch.zeros(value.numel() // value.shape[-1], value.shape[-1])


def _in_float(layer: nn.Module, activation: str, values: Tensor) -> Tensor:
    result: Tensor = layer(values)
    if not activation:
        return result
    function = getattr(functional, activation, None)
    return result.clamp(0, 6) if function is None else function(result)  # the bounds of a clamp do not change its time


def _timed(calls: Mapping[str, Callable[[], Any]]) -> LayerTimes:
    """Return the medians of all calls."""
    first = time_in_turn(calls, runs=1, warmup=1)
    once = sum(times.median for times in first.values())
    runs = min(max(int(_BUDGET / (2 * once)), _FEWEST), _MOST)
    found = {name: times.median * 1000 for name, times in time_in_turn(calls, runs=runs, warmup=0, settle=1).items()}
    entering, leaving = found.pop("entering"), found.pop("leaving")
    return LayerTimes(found, entering, leaving)
