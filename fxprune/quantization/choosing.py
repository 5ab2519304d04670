"""What becomes of a graph: layers, forms and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from fxprune.quantization.activations import trimmed
from fxprune.quantization.building import Numbers
from fxprune.quantization.layers import Kind, without_kind
from fxprune.quantization.placement import Placement, place
from fxprune.quantization.ranges import Ranges
from fxprune.quantization.selection import Wanted, select
from fxprune.quantization.values import Values, operand
from fxprune.runtime.int8 import Affine

__all__ = ["Choice", "ChosenLayer", "choose"]


@dataclass(frozen=True)
class ChosenLayer:
    """A layer that will compute on uint8.

    Attributes:
        node: its call.
        result: the node of what it gives, with its activation.
        kind: what it is.
        numbers: of what it takes and gives.
    """

    node: fx.Node
    result: fx.Node
    kind: Kind
    numbers: Numbers


@dataclass(frozen=True)
class Choice:
    """What becomes of a graph.

    Attributes:
        layers: that compute on uint8.
        placement: where values change their form.
        affines: quantisation of the values that do, by node.
        fills: the level of zero of the uint8 values that zeros are added to, by the node that does.
        identities: nodes that do nothing but give uint8 values on; in training they would fail.
        floating: (path, reason) of the convolutions and linear layers that stay in float.
    """

    layers: tuple[ChosenLayer, ...]
    placement: Placement
    affines: Mapping[fx.Node, Affine]
    fills: Mapping[fx.Node, int]
    identities: tuple[fx.Node, ...]
    floating: tuple[tuple[str, str], ...]


def choose(module: fx.GraphModule, ranges: Ranges | None, wanted: Wanted) -> Choice:
    """Choose layers, forms and numbers; the module stays as it is.

    Raises:
        InputError: the graph is in training mode, has masked weights, or was not calibrated.
        SpecError: a pattern or a path that matches nothing.
    """
    values = Values(module)
    reasons = select(values, ranges, wanted)
    nodes = [node for node in values.kinds if not reasons[str(node.target)]]
    others = {path: wanted.keep_float.get(path, reason) for path, reason in without_kind(module).items()}
    floating = {path: reason for path, reason in reasons.items() if reason} | others
    known = Ranges("", {}) if ranges is None else ranges
    return _Numbers(values, known, nodes).choice(tuple(floating.items()))


class _Numbers:
    """The layers of a choice with their activations, forms and quantisations."""

    def __init__(self, values: Values, ranges: Ranges, nodes: list[fx.Node]) -> None:
        self.values = values
        self.ranges = ranges
        self.nodes = nodes
        self.fused = {node: values.activations[node] for node in nodes if self._is_fused(node)}
        tables = {self._result(node): self._has_table(node) for node in nodes}
        self.placement = place(values, tables, set(nodes))

    def choice(self, floating: tuple[tuple[str, str], ...]) -> Choice:
        changed = (*self.placement.quantized, *self.placement.dequantized)
        affines = {node: self._affine(node) for node in changed}
        levels = {node: self.values.rules[node] for node in self.values.nodes if node in self.placement.levels}
        fills = {node: self._affine(node).zero_point for node, rule in levels.items() if rule.pads}
        identities = tuple(node for node, rule in levels.items() if rule.is_identity)
        layers = tuple(self._layer(node) for node in self.nodes)
        return Choice(layers, self.placement, affines, fills, identities, floating)

    def _is_fused(self, node: fx.Node) -> bool:
        """Whether a layer computes the activation behind it; by a table only where both ranges are known."""
        if node not in self.values.activations:
            return False
        reader, activation = self.values.activations[node]
        return activation.bounds is not None or {node.name, reader.name} <= self.ranges.by_name.keys()

    def _result(self, node: fx.Node) -> fx.Node:
        return self.fused[node][0] if node in self.fused else node

    def _has_table(self, node: fx.Node) -> bool:
        return node in self.fused and self.fused[node][1].bounds is None

    def _affine(self, node: fx.Node) -> Affine:
        return self.ranges.by_name[self.placement.grid(self.values, node)].affine

    def _layer(self, node: fx.Node) -> ChosenLayer:
        result = self._result(node)
        target = self._affine(result) if result in self.placement.levels else None
        activation = self.fused[node][1] if node in self.fused else None
        before = None
        if activation is not None and activation.bounds is None:
            found = self.ranges.by_name
            before = trimmed(activation.function, found[node.name], found[result.name]).affine
        numbers = Numbers(self._affine(operand(node)), target, activation, before)
        return ChosenLayer(node, result, self.values.kinds[node], numbers)
