"""Which values of a graph are uint8, and where they become so.

Whether a value is uint8 is decided by those who read it: backwards, what every reader would like, and then forwards,
what can be given.

1. What an operator that computes on uint8 gives is uint8 where all of its readers take that, float32 otherwise.
2. What a table gives is uint8 always; one `dequantize` serves those who want float32.
3. Operators that take any form stand on the uint8 side where all of their readers do.
4. A float value that several such readers take is quantised once. Where there is one reader only, and it moves or
   selects values, it goes first: fewer values are quantised. A reader that gives more values than it takes does not go
   first, nor does one that takes channels away from the last dimension, where quantising finds and leaves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from torch import fx

from fxprune.quantization.permuting import LAST, dimension_before
from fxprune.quantization.rules import COMPUTES, FLOAT, Rule
from fxprune.quantization.values import Values, is_tensor, operand

__all__ = ["Placement", "place"]

_LEVELS = {"uint8"}


@dataclass(frozen=True)
class Placement:
    """Where the values of a graph change their form.

    Attributes:
        levels: the nodes whose values are uint8.
        quantized: the readers that take uint8 of a float value, by its node.
        dequantized: the readers that take float32 of a uint8 value, by its node.
        channels: the dimension, counted from the last, in which readers that take uint8 find channels, by node.
    """

    levels: Set[fx.Node]
    quantized: Mapping[fx.Node, tuple[fx.Node, ...]]
    dequantized: Mapping[fx.Node, tuple[fx.Node, ...]]
    channels: Mapping[fx.Node, int]

    def grid(self, values: Values, node: fx.Node) -> str:
        """Return the name of the value whose range a uint8 value has, or a float value when it is quantised."""
        while node in self.levels and values.rules[node].keeps_form:
            node = operand(node)
        return values.same(node).name if node not in self.levels else node.name


def place(values: Values, results: Mapping[fx.Node, bool], layers: Set[fx.Node]) -> Placement:
    """Decide the form of every value.

    Args:
        values: of the graph.
        results: what the layers that compute on uint8 give, and whether it comes from a table.
        layers: those layers.
    """
    return _Forms(values, results, layers).solve()


class _Forms:
    def __init__(self, values: Values, results: Mapping[fx.Node, bool], layers: Set[fx.Node]) -> None:
        self.values = values
        self.results = results
        self.layers = layers
        self.wanted: dict[fx.Node, set[str]] = {}
        self.channels: dict[fx.Node, int] = {}
        self.levels: set[fx.Node] = set()
        self.quantized: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def solve(self) -> Placement:
        for node in reversed(self.values.nodes):
            self.wanted[node] = {form for reader in node.users for form in self._wishes(reader, node)}
            self.channels[node] = self._channels(node)
        for node in self.values.nodes:
            if self._can_be_levels(node):
                self.levels.add(node)
            elif takers := self._quantized_for(node):
                self.quantized[node] = takers
        dequantized = {node: self._float_readers(node) for node in self.values.nodes if node in self.levels}
        floats = {node: readers for node, readers in dequantized.items() if readers}
        return Placement(self.levels, self.quantized, floats, self.channels)

    def _rule(self, node: fx.Node) -> Rule:
        rule = self.values.rules[node]
        return FLOAT if rule is COMPUTES and node not in self.layers else rule

    def _wishes(self, reader: fx.Node, node: fx.Node) -> set[str]:
        """Return the forms in which one reader would like a value."""
        rule = self._rule(reader)
        if rule.takes == "float" or not _reads_it_first(reader, node):
            return {"float"}
        if rule.takes == "any":
            return self.wanted[reader] if rule.keeps_form else set()
        return {rule.takes}

    def _takers(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the readers that would like a value as uint8, and nothing else."""
        return tuple(reader for reader in node.users if self._wishes(reader, node) == _LEVELS)

    def _channels(self, node: fx.Node) -> int:
        if not is_tensor(node):
            return LAST
        found = (
            self.values.kinds[reader].channels
            if reader in self.layers
            else dimension_before(reader, self.channels[reader])
            for reader in self._takers(node)
        )
        return min(found, default=LAST)

    def _can_be_levels(self, node: fx.Node) -> bool:
        if node in self.results:
            return self.results[node] or self.wanted[node] == _LEVELS
        if not self._rule(node).keeps_form or self.wanted[node] != _LEVELS:
            return False
        return operand(node) in self.levels or operand(node) in self.quantized

    def _quantized_for(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the readers for which a float value is quantised; none where they come to that themselves."""
        takers = self._takers(node)
        if any(self._stays_behind(reader, node) for reader in takers):
            return takers
        return takers if len(takers) > 1 and is_tensor(node) else ()

    def _stays_behind(self, reader: fx.Node, node: fx.Node) -> bool:
        """Whether a float value is quantised before a reader takes it, even for that one alone."""
        rule = self._rule(reader)
        takes_away = is_tensor(node) and self.channels[reader] < self.channels[node] == LAST
        return rule is COMPUTES or rule.pads or takes_away

    def _float_readers(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(reader for reader in node.users if self._wishes(reader, node) - _LEVELS)


def _reads_it_first(reader: fx.Node, node: fx.Node) -> bool:
    """Whether a reader takes a value as its first argument, and nowhere else."""
    others: list[fx.Node] = []
    fx.node.map_arg((reader.args[1:], reader.kwargs), others.append)
    return reader.args[:1] == (node,) and node not in others
