"""One executed ATen operator, as a rule sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch._ops import OpOverload

from fxprune.labels.flow import Flow, Label, Labels

__all__ = ["Call", "Rule"]


@functools.cache
def _signature(operator: OpOverload) -> dict[str, tuple[int, Any]]:
    """Return the position and default of every argument of an operator."""
    return {a.name: (i, a.default_value) for i, a in enumerate(operator._schema.arguments)}


class Surroundings(Protocol):
    """What the propagation knows at one operator."""

    flow: Flow
    inputs: list[Tensor]
    """Values that the current node reads."""
    may_reshape: bool
    """Whether surgery can make the current node right after it divided, merged or expanded channels."""
    spelling: str
    """The current node's operator as Python spells it (`mean`), empty in a leaf module."""

    def read(self, tensor: Tensor) -> Labels:
        """Return the labels of a tensor."""

    def constant(self, tensor: Tensor) -> Tensor | None:
        """Return the real values of an integer table, None for a tensor that depends on data."""

    def varies(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on an input of the graph: an activation, no constant and no weight."""

    def source(self, tensor: Tensor) -> str | None:
        """Return the input node of the current node whose zeros are zeros of this tensor."""


class Call:
    """Arguments by name, the result, and the labels of every tensor among them."""

    def __init__(
        self, around: Surroundings, operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        self.flow = around.flow
        self.labels = around.read
        self.constant = around.constant
        self.source = around.source
        self.varies = around.varies
        self.inputs = around.inputs
        self.may_reshape = around.may_reshape
        self.spelling = around.spelling
        self.operator = operator
        self.args = args
        self.kwargs = kwargs
        self.result = result

    def __getitem__(self, name: str) -> Any:
        """The argument `name` of the operator's schema, its default where it was not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        position, default = _signature(self.operator)[name]
        return self.args[position] if position < len(self.args) else default

    def accepts(self, name: str) -> bool:
        """Whether the operator has an argument `name`."""
        return name in _signature(self.operator)

    @property
    def is_whole_node(self) -> bool:
        """Whether this operator is all that the current node does, so that surgery can rewrite it."""
        return self.spelling == self.operator._schema.name.split("::")[1]

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor argument, those in lists included."""
        found: list[Tensor] = []
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, (list, tuple)):
                found.extend(v for v in value if isinstance(v, Tensor))
        return found

    def pin_all(self, text: str) -> None:
        """Pin every labelled dimension of every argument."""
        for tensor in self.tensors:
            self.pin(tensor, text)

    def pin(self, tensor: Tensor, text: str, first: int = 0) -> None:
        """Pin every labelled dimension of one argument, from dimension `first` on."""
        for label in self.labels(tensor)[first:]:
            self.flow.pin(label, text)

    def made(self, size: int) -> Label:
        """Return the label of a dimension whose positions are all alike: fresh slots, as many as are wanted.

        In a node whose sizes cannot be re-derived it is None, and an input of that size, which it may repeat, is
        pinned.
        """
        if size <= 1:
            return None
        if self.may_reshape:
            return self.flow.slots.fresh(size)
        for tensor in self.inputs:
            for label in self.labels(tensor):
                if label is not None and label.numel() == size:
                    self.flow.pin(label, "its size may be repeated where it cannot be re-derived")
        return None

    def absorb(self, tensor: Tensor, dim: int) -> None:
        """State that the operator sums over dimension `dim` of an activation, where a mask can stand before it.

        A mask stands before the node, so a node that transforms the channels before it absorbs them pins them.
        """
        label, source = self.labels(tensor)[dim], self.source(tensor)
        if source is None:
            self.flow.pin(label, "absorbed inside a leaf module after a transformation")
        else:
            self.flow.absorb(label, source)

    def contract(self, a: tuple[Tensor, int], b: tuple[Tensor, int]) -> None:
        """State that the operator sums over dimension a[1] of a[0] times dimension b[1] of b[0]."""
        left, right = self.labels(a[0])[a[1]], self.labels(b[0])[b[1]]
        self.flow.unite(left, right)
        if left is None or right is None:
            return
        self.absorb(*(b if self.source(a[0]) is None and self.source(b[0]) is not None else a))


Rule = Callable[[Call], Labels | list[Labels] | None]
"""States its facts and returns the labels of the result: one `Labels` for every tensor result, a list for several,
None where nothing of the result can be pruned."""


def normalised(dim: int, ndim: int) -> int:
    """Return a dimension counted from the front."""
    return dim % ndim if ndim else 0


def nothing(tensor: Tensor) -> Labels:
    """Labels of a tensor of which nothing can be pruned."""
    return (None,) * tensor.dim()


def is_labelled(labels: Labels) -> bool:
    """Whether any dimension has a label."""
    return any(label is not None for label in labels)
