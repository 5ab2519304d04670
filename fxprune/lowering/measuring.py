"""Times what could compute a quantised layer on this machine: our kernels, oneDNN's, and the float layer itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxprune.latency import time_in_turn
from fxprune.lowering.choices import DENSE, Choice, zero_blocks
from fxprune.runtime import native
from fxprune.runtime.int8 import CHANNELS_LAST, PACKED, BlockSparseInt8Linear, Int8Linear, pack, quantize
from fxprune.runtime.int8.backends import refusal
from fxprune.runtime.int8.layer import Int8Layer

__all__ = ["FLOAT", "OURS", "LayerTimes", "Stopwatch"]

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


class Stopwatch:
    """Times layers, equal ones once.

    `block` is the form of sparse weights, as "1x4".
    """

    def __init__(self, block: str) -> None:
        self.block = block
        self.known: dict[Any, LayerTimes] = {}
        native.load()  # before any layer is timed: what has no backends to choose from takes what is loaded

    def time(self, node: fx.Node, layer: Int8Layer, floating: nn.Module) -> LayerTimes:
        """Time what could compute a call.

        Args:
            node: the call of the quantised layer.
            layer: that layer.
            floating: the float layer that it was made of, without its activation.
        """
        given, made = node.all_input_nodes[0].meta["val"], node.meta["val"]
        calls = _Calls(layer, floating, given, made, self.block)
        if calls.kind not in self.known:
            self.known[calls.kind] = _timed(calls.all())
        return self.known[calls.kind]


class _Calls:
    """What is timed of a layer that takes and makes values like `given` and `made`."""

    def __init__(self, layer: Int8Layer, floating: nn.Module, given: Tensor, made: Tensor, block: str) -> None:
        self.layer, self.floating, self.given, self.made = layer, floating, given, made
        self.block = block
        self.zeros = zero_blocks(layer.weight, block) if isinstance(layer, Int8Linear) else 0.0

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the times depend on."""
        values = (self.given.shape, self.given.stride(), self.made.shape, round(self.zeros, 2), str(self.floating))
        return (*values, self.layer.dtype, self.layer.table is not None, self.layer.activation)

    def all(self) -> dict[str, Callable[[], Any]]:
        """Return all candidates, and the two conversions."""
        generator = torch.Generator().manual_seed(0)
        levels = torch.empty_like(self.given, dtype=torch.uint8, device="cpu")
        levels.copy_(torch.randint(0, 256, self.given.shape, generator=generator))
        values = (levels.float() - self.layer.source.zero_point) * self.layer.source.scale
        layout = PACKED if isinstance(self.layer, Int8Linear) else CHANNELS_LAST
        return {
            FLOAT: partial(_in_float, self.floating, self.layer.activation, values),
            **self._on_levels(levels),
            "entering": partial(quantize, _as_rows(self.given), 1.0, 0, layout),
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
        return {name: partial(layer, _laid_out(layer, levels)) for name, layer in able.items()}


def _as_rows(value: Tensor) -> Tensor:
    """Return floats that lie like a value, as one that is quantised."""
    return torch.zeros(value.numel() // value.shape[-1], value.shape[-1])


def _laid_out(layer: BlockSparseInt8Linear, levels: Tensor) -> Tensor:
    """Return values as a layer reads them best, and let it do so."""
    if layer.backend != "native":
        return levels
    layer.input_layout, layer.output_layout = PACKED, CHANNELS_LAST if layer.target is None else PACKED
    return pack(levels)


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
