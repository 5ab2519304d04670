"""How values of a graph depend on each other: which activations belong to layers, and which ranges layers need."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from torch import Tensor, fx

from fxprune.quantization.activations import Activation, find_activation
from fxprune.quantization.layers import Kind, find_kind
from fxprune.quantization.rules import Rule, rule_of, written_by

__all__ = ["Values", "is_tensor", "operand"]


def operand(node: fx.Node) -> fx.Node:
    """Return the first argument of a node that has one."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def is_tensor(node: fx.Node) -> bool:
    """Whether a node's value is known to be one tensor."""
    return isinstance(node.meta.get("val"), Tensor)


class Values:
    """The values of a graph, as quantisation sees them; nothing here depends on data."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.nodes = list(module.graph.nodes)
        self.rules: dict[fx.Node, Rule] = {node: rule_of(module, node) for node in self.nodes}
        self.kinds: dict[fx.Node, Kind] = dict(self._layers())

    def _layers(self) -> Iterator[tuple[fx.Node, Kind]]:
        """Yield the calls of layers that may compute on uint8."""
        for node in self.nodes:
            kind = find_kind(self.module.get_submodule(str(node.target))) if node.op == "call_module" else None
            if kind is not None:
                yield node, kind

    @cached_property
    def activations(self) -> dict[fx.Node, tuple[fx.Node, Activation]]:
        """The activation behind a layer that nothing else reads, by the layer's node."""
        found: dict[fx.Node, tuple[fx.Node, Activation]] = {}
        for node in self.kinds:
            reader = self._only_reader(node)
            activation = None if reader is None else find_activation(self.module, reader)
            if reader is not None and activation is not None and self._allows(reader, activation):
                found[node] = reader, activation
        return found

    def _only_reader(self, node: fx.Node) -> fx.Node | None:
        """Return who alone reads a value, behind those who only give it on."""
        while len(node.users) == 1:
            (node,) = node.users
            if not self.rules[node].is_identity:
                return node
        return None

    def _allows(self, reader: fx.Node, activation: Activation) -> bool:
        """Whether what a table gives stays as it is: who writes into it writes into a copy."""
        return activation.bounds is not None or not self.is_written(reader)

    def is_written(self, node: fx.Node) -> bool:
        """Whether something is written in place into a node's value, or into a view of it, once it is there."""
        return self._last_writes.get(self._memory(node), -1) > self._positions[node]

    @cached_property
    def _positions(self) -> dict[fx.Node, int]:
        return {node: position for position, node in enumerate(self.nodes)}

    @cached_property
    def _last_writes(self) -> dict[fx.Node, int]:
        """The position of the last node that writes into a memory, by the node that made that."""
        return {self._memory(into): self._positions[node] for node in self.nodes for into in self._written[node]}

    @cached_property
    def _written(self) -> dict[fx.Node, list[fx.Node]]:
        """What every node writes into; none where it gives a value on and does no more."""
        return {n: [] if self.rules[n].keeps_form else written_by(self.module, n) for n in self.nodes}

    def _memory(self, node: fx.Node) -> fx.Node:
        """Return the node that made the memory in which a value lies: what writes in place gives the same memory."""
        while self.rules[node].keeps_form or self._written[node]:
            node = operand(node) if self.rules[node].keeps_form else self._written[node][0]
        return node

    def origin(self, node: fx.Node) -> fx.Node:
        """Return the node whose values, or a part of them, a node gives on."""
        return list(self.chain(node))[-1]

    def chain(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield a node and those before it whose values it gives on."""
        while self.rules[node].keeps_form:
            yield node
            node = operand(node)
        yield node

    def same(self, node: fx.Node) -> fx.Node:
        """Return the first node that has exactly the values of a node: they share a range."""
        while self.rules[node].keeps_values:
            node = operand(node)
        return node

    def needed(self, layer: fx.Node) -> list[str]:
        """Return the names of the values whose ranges the input of a layer may need."""
        chain = (node for node in self.chain(operand(layer)) if is_tensor(node) or "val" not in node.meta)
        return list(dict.fromkeys(self.same(node).name for node in chain))

    @cached_property
    def watched(self) -> dict[str, bool]:
        """The names of all values whose ranges may be needed, and whether they are what a table takes."""
        callable_so = [layer for layer in self.kinds if layer.args and isinstance(layer.args[0], fx.Node)]
        found = {name: False for layer in callable_so for name in self.needed(layer)}
        for layer, (reader, activation) in self.activations.items():
            if activation.bounds is None:
                found |= {layer.name: True, reader.name: False}
        return found
