"""Gives every quantised value of a graph a layout, and converts it where a reader needs another.

What operators can do is one table of roles: the layouts that they read and write, and what each costs them. Values
that must lie alike, such as those around an operator that keeps the layout, are one group. A group gets the layout in
which all that write and read its values cost least; a conversion that this takes counts `CONVERSION`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import networkx as nx
import torch
from torch import Tensor, fx, nn

from fxprune.graph.shapes import propagate_shapes
from fxprune.runtime.int8 import CHANNELS_LAST, PACKED, BlockSparseInt8Linear, dequantize, pack, quantize, unpack
from fxprune.runtime.int8.layouts import LAYOUTS

__all__ = ["CONVERSION", "assign_layouts"]

CONVERSION = 2.0
"""What `pack` or `unpack` costs, where our kernels pay 1 for reading or for writing channels-last values."""

Costs = Mapping[str, float]
"""Layout → what it costs an operator to read or write it; one that is missing takes a conversion."""

_PLAIN: Costs = {CHANNELS_LAST: 0.0}
_EITHER: Costs = {CHANNELS_LAST: 0.0, PACKED: 0.0}
_OURS: Costs = {CHANNELS_LAST: 1.0, PACKED: 0.0}


class _Role(NamedTuple):
    """What an operator does with the layout of quantised values; most read and write them channels-last.

    Attributes:
        reads: of all that it reads.
        writes: of what it writes.
        keeps: whether it writes in the layout that it reads.
        tell: tells a node in which layouts it reads and writes.
    """

    reads: Costs = _PLAIN
    writes: Costs = _PLAIN
    keeps: bool = False
    tell: Callable[[fx.Node, str, str], None] = lambda node, read, written: None  # noqa: ARG005


_FUNCTIONS: dict[Any, _Role] = {
    quantize: _Role(writes=_EITHER, tell=lambda node, _, written: node.update_arg(3, written)),
    dequantize: _Role(reads=_EITHER, tell=lambda node, read, _: node.update_arg(3, read)),
}

_KEEPING = _Role(_EITHER, _EITHER, keeps=True)

_MODULES: dict[type[nn.Module], _Role] = {nn.Identity: _KEEPING, nn.Dropout: _KEEPING}


def _role_of(module: fx.GraphModule, node: fx.Node) -> _Role:
    if node.op != "call_module":
        return _FUNCTIONS.get(node.target, _Role())
    leaf = module.get_submodule(str(node.target))
    return _role_of_layer(leaf) if isinstance(leaf, BlockSparseInt8Linear) else _MODULES.get(type(leaf), _Role())


def _role_of_layer(layer: BlockSparseInt8Linear) -> _Role:
    """Our kernels read and write both layouts; of other backends, packed values would be converted within."""

    def tell(_: fx.Node, read: str, written: str) -> None:
        layer.input_layout, layer.output_layout = read, written

    costs = _OURS if layer.backend == "native" else _PLAIN
    return _Role(costs, _PLAIN if layer.target is None else costs, tell=tell)


def assign_layouts(module: fx.GraphModule) -> None:
    """Choose the layouts of a graph's quantised values, in place, whatever they were before.

    Only operators that have a role can read packed values.
    """
    _reset(module)
    _Layouts(module).write()
    propagate_shapes(module)


def _reset(module: fx.GraphModule) -> None:
    """Have all values channels-last, without conversions."""
    for node in list(module.graph.nodes):
        _role_of(module, node).tell(node, CHANNELS_LAST, CHANNELS_LAST)
        if node.target in (pack, unpack):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    propagate_shapes(module)


class _Layouts:
    """The layout of every quantised value, and the nodes that convert it."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.graph = module.graph
        self.roles = {node: _role_of(module, node) for node in module.graph.nodes}
        self.values = {node for node in module.graph.nodes if _is_quantised(node)}
        self.converted: dict[tuple[fx.Node, str], fx.Node] = {}
        self.chosen: dict[fx.Node, str] = {}
        for group in self._groups():
            self.chosen |= dict.fromkeys(group, min(LAYOUTS, key=lambda layout: self._cost(group, layout)))

    def _groups(self) -> Iterable[set[fx.Node]]:
        """Return the values that must lie alike."""
        alike = nx.Graph()
        alike.add_nodes_from(self.values)
        calls: dict[str, list[fx.Node]] = defaultdict(list)
        for node, role in self.roles.items():
            if role.keeps:
                alike.add_edges_from((node, source) for source in self._read_by(node))
            if node.op == "call_module":
                calls[str(node.target)].append(node)
        for nodes in calls.values():  # a layer that is called again reads and writes as the first time
            alike.add_edges_from(pairwise(node for node in nodes if node in self.values))
            alike.add_edges_from(pairwise(source for node in nodes for source in self._read_by(node)))
        return nx.connected_components(alike)

    def _read_by(self, node: fx.Node) -> Iterator[fx.Node]:
        yield from (source for source in node.all_input_nodes if source in self.values)

    def _cost(self, group: Iterable[fx.Node], layout: str) -> float:
        return sum(self._cost_of(value, layout) for value in group)

    def _cost_of(self, value: fx.Node, layout: str) -> float:
        """Return what all pay who write and read a value in a layout; it is converted at most once."""
        costs = [self.roles[value].writes, *(self.roles[user].reads for user in value.users)]
        conversion = 0.0 if all(layout in cost for cost in costs) else CONVERSION
        return conversion + sum(cost.get(layout, 0.0) for cost in costs)

    def write(self) -> None:
        """Tell all operators their layouts, and insert the conversions between them."""
        written = {node: _of(role.writes, self.chosen.get(node)) for node, role in self.roles.items()}
        for node, role in self.roles.items():
            read = CHANNELS_LAST
            for source in list(self._read_by(node)):
                read = _of(role.reads, self.chosen[source])
                if read != written[source]:
                    node.replace_input_with(source, self._convert(source, read))
            role.tell(node, read, written[node])

    def _convert(self, value: fx.Node, layout: str) -> fx.Node:
        """Return the node that gives a value in the other layout."""
        if (value, layout) not in self.converted:
            operator, arguments = (pack, ()) if layout == PACKED else (unpack, (value.meta["val"].shape[-1],))
            name = f"{value.name}_{'packed' if layout == PACKED else 'unpacked'}"
            with self.graph.inserting_after(value):
                node = self.graph.create_node("call_function", operator, (value, *arguments), name=name)
            self.converted[value, layout] = node
        return self.converted[value, layout]


def _of(costs: Costs, layout: str | None) -> str:
    """Return a layout where an operator has it, else the one that it has."""
    return layout if layout is not None and layout in costs else next(iter(costs))


def _is_quantised(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.dtype == torch.uint8
