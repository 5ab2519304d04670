"""Which layers of a quantised graph are faster in float, when what changes between the two forms counts too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import networkx as nx
from torch import fx

from fxprune.lowering.measuring import FLOAT, FloatCall, LayerTimes, Stopwatch
from fxprune.runtime.int8 import Int8Linear, dequantize, quantize
from fxprune.runtime.int8.layer import Int8Layer

__all__ = ["Decision", "decide", "quantised_layers"]


@dataclass(frozen=True)
class Decision:
    """What computes the layers of a graph.

    Attributes:
        graph: the quantised graph without the layers that are faster in float.
        choices: path → choice of its linear layers.
        floating: path → reason of the others that were measured.
        times: path → what was measured of it.
    """

    graph: fx.GraphModule
    choices: Mapping[str, str]
    floating: Mapping[str, str]
    times: Mapping[str, LayerTimes]


def decide(
    quantise: Callable[[Mapping[str, str]], fx.GraphModule], floats: fx.GraphModule, stopwatch: Stopwatch
) -> Decision:
    """Keep those layers in float that are faster so, until none is.

    Args:
        quantise: returns the quantised graph but for some layers, path → reason.
        floats: the graph with all of them in float, as it is then.
        stopwatch: times layers.
    """
    floating: dict[str, str] = {}
    times: dict[str, LayerTimes] = {}
    calls = FloatCall.of_graph(floats)
    while True:
        graph = quantise(floating)
        layers = quantised_layers(graph)
        times |= {path: stopwatch.time(node, layer, calls[path]) for path, (node, layer) in layers.items()}
        slower = _Regions(layers, times).slower()
        if not slower:
            linear = [path for path, (_, layer) in layers.items() if isinstance(layer, Int8Linear)]
            return Decision(graph, {path: str(times[path].best) for path in linear}, floating, times)
        floating |= slower


def quantised_layers(module: fx.GraphModule) -> dict[str, tuple[fx.Node, Int8Layer]]:
    """Return path → (call, layer) of a graph's quantised layers, each of which is called once."""
    called = [node for node in module.graph.nodes if node.op == "call_module"]
    found = {str(node.target): (node, module.get_submodule(str(node.target))) for node in called}
    return {path: (node, layer) for path, (node, layer) in found.items() if isinstance(layer, Int8Layer)}


class _Regions:
    """The quantised layers of a graph, what each costs, and which give uint8 to which."""

    def __init__(self, layers: Mapping[str, tuple[fx.Node, Int8Layer]], times: Mapping[str, LayerTimes]) -> None:
        self.times = times
        self.nodes = {path: node for path, (node, _) in layers.items()}
        self.paths = {node: path for path, node in self.nodes.items()}
        self.origins = {path: self._origin(node) for path, node in self.nodes.items()}
        self.gives_levels = {path for path, (_, layer) in layers.items() if layer.target is not None}

    def _origin(self, node: fx.Node) -> fx.Node:
        """Return the node that made the uint8 values that a layer reads, behind what only moves them."""
        source = node.all_input_nodes[0]
        while source.target is not quantize and source not in self.paths and source.all_input_nodes:
            source = source.all_input_nodes[0]
        return source

    def slower(self) -> dict[str, str]:
        """Return path → reason of the layers that are faster in float: whole regions of uint8, and single layers."""
        found: dict[str, str] = {}
        for region in self._regions():
            levels, floats = sum(map(self._on_levels, region)), sum(self.times[path].choices[FLOAT] for path in region)
            if floats < levels < math.inf:
                found |= dict.fromkeys(region, _reason(floats, levels, len(region)))
        for path in self.nodes:
            if path not in found and self._in_float(path) < self._on_levels(path):
                found[path] = _reason(self._in_float(path), self._on_levels(path), 1)
        return found

    def _regions(self) -> Iterable[set[str]]:
        graph = nx.Graph()
        graph.add_nodes_from(self.nodes)
        graph.add_edges_from((path, self.paths[o]) for path, o in self.origins.items() if o in self.paths)
        return nx.connected_components(graph)

    def _on_levels(self, path: str) -> float:
        """Return what a layer costs on uint8, with its share of the conversions that are made for it."""
        times, origin = self.times[path], self.origins[path]
        cost = math.inf if times.best is None else times.choices[times.best]
        if origin.target is quantize:
            cost += times.entering / sum(other is origin for other in self.origins.values())
        return cost + times.leaving * any(user.target is dequantize for user in self.nodes[path].users)

    def _in_float(self, path: str) -> float:
        """Return what a layer costs in float, with the conversions that its neighbours would need then."""
        times, origin = self.times[path], self.origins[path]
        is_shared = origin.target is not quantize and len(origin.users) > 1
        is_read = any(user.target is not dequantize for user in self.nodes[path].users)
        after = times.leaving * (path in self.gives_levels and is_read)
        return times.choices[FLOAT] + times.entering * is_shared + after


def _reason(floats: float, levels: float, layers: int) -> str:
    """Say why layers stay in float, by the microseconds of both."""
    if math.isinf(levels):
        return "no kernel for uint8 runs here"
    together = f" for {layers} layers together" if layers > 1 else ""
    return f"float is faster here: {floats:.0f} µs against {levels:.0f} µs{together}"
