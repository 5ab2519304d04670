"""The time of every node of a graph."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.graph.inputs import Inputs
from fxprune.latency import barrier
from fxprune.runtime.weight_masks import kind_of

__all__ = ["KindTime", "LayerTime", "LayerTimer", "LayerTimes"]


@dataclass(frozen=True)
class LayerTime:
    """The median of one call in a graph.

    Attributes:
        node: name of the node.
        layer: path of the module that it calls, empty for functions and methods.
        kind: the module's type, or the function's name.
        milliseconds: median of the runs.
        is_lowered: whether it is a layer that lowering replaces, in the graph before, or made, in the graph after.
    """

    node: str
    layer: str
    kind: str
    milliseconds: float
    is_lowered: bool = False


@dataclass(frozen=True)
class KindTime:
    """All calls of one kind together."""

    kind: str
    calls: int
    milliseconds: float


@dataclass(frozen=True)
class LayerTimes:
    """The calls of a variant's graph in their order, each timed alone; nothing is fused across them."""

    variant: str
    layers: tuple[LayerTime, ...]

    @property
    def total(self) -> float:
        """Milliseconds of all calls, without what runs between them."""
        return sum(layer.milliseconds for layer in self.layers)

    @property
    def lowered(self) -> float:
        """Milliseconds of the layers that lowering replaces or made."""
        return sum(layer.milliseconds for layer in self.layers if layer.is_lowered)

    def share(self, milliseconds: float) -> float:
        """Return a part of the total as a fraction of it."""
        return milliseconds / self.total if self.total else 0.0

    @property
    def kinds(self) -> tuple[KindTime, ...]:
        """The kinds of calls that occur, the dearest first."""
        taken: dict[str, list[float]] = {}
        for layer in self.layers:
            taken.setdefault(layer.kind, []).append(layer.milliseconds)
        kinds = [KindTime(kind, len(times), sum(times)) for kind, times in taken.items()]
        return tuple(sorted(kinds, key=lambda kind: -kind.milliseconds))


class LayerTimer:
    """A graph that is run node by node, every call timed."""

    def __init__(self, variant: str, module: fx.GraphModule, inputs: Inputs) -> None:
        self.variant = variant
        self.module = module
        self.arguments = _arguments(module, inputs)
        self.stopwatch = _Stopwatch(module, barrier(inputs))

    def run(self) -> Any:
        """Run the whole graph once, in the mode that it is in, and return its outputs."""
        return self.stopwatch.run(*self.arguments)

    def times(self, runs: slice = slice(None), lowered: Set[str] = frozenset()) -> LayerTimes:
        """Return the medians of some of the runs; modules at the paths `lowered` count as lowered."""
        taken = {node: statistics.median(times[runs]) for node, times in self.stopwatch.taken.items()}
        return LayerTimes(self.variant, tuple(_layer_time(self.module, node, taken[node], lowered) for node in taken))


def _arguments(module: fx.GraphModule, inputs: Inputs) -> tuple[Any, ...]:
    """Return the values of the placeholders, which a traced graph has only for what holds tensors."""
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError:
        held = {name: value for name, value in inputs.kwargs.items() if _holds_tensors(value)}
        bound = signature.bind(*filter(_holds_tensors, inputs.args), **held)
    bound.apply_defaults()
    return (*bound.args, *bound.kwargs.values())


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _layer_time(module: fx.GraphModule, node: fx.Node, milliseconds: float, lowered: Set[str]) -> LayerTime:
    if node.op != "call_module":
        return LayerTime(node.name, "", _function_name(node.target), milliseconds)
    layer = str(node.target)
    return LayerTime(node.name, layer, kind_of(module.get_submodule(layer)), milliseconds, layer in lowered)


def _function_name(target: Any) -> str:
    """Return what a dump calls a function, or a method, with a dot before it."""
    return f".{target}" if isinstance(target, str) else str(getattr(target, "__name__", target))


class _Stopwatch(fx.Interpreter):
    """Runs a graph and keeps the milliseconds of every call; what the interpreter does between them is not counted."""

    def __init__(self, module: fx.GraphModule, wait: Callable[[], None]) -> None:
        super().__init__(module)
        self.wait = wait
        self.taken: dict[fx.Node, list[float]] = {}
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; the calls below learn which it is."""
        self.current = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call and time a function."""
        return self._timed(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call and time a method."""
        owner, *rest = args
        return self._timed(getattr(owner, target), tuple(rest), kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call and time a module."""
        return self._timed(self.fetch_attr(target), args, kwargs)

    def _timed(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.current is not None
        self.wait()
        start = time.perf_counter()
        result = call(*args, **kwargs)
        self.wait()
        self.taken.setdefault(self.current, []).append((time.perf_counter() - start) * 1000)
        return result
