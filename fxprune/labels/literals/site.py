"""One node of the narrow graph and what is known of it before and after the cut."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxprune.graph.inputs import on_meta
from fxprune.graph.shapes import record_shape
from fxprune.labels.flow import Label, Labelled

__all__ = ["Kept", "Rewrite", "Site", "operator_of"]


class Kept(Protocol):
    """What is kept after the cut, by node and label; `fxprune.narrowing.kept.Kept` is one."""

    def value(self, node: str) -> Any:
        """Return the value of a node before the cut, tensors as `Labelled`."""

    def shapes(self, node: str) -> list[tuple[int, ...]]:
        """Return the predicted shapes of all tensors in a node's value."""

    def is_repeated(self, label: Tensor) -> bool:
        """Whether positions of a label are kept or removed together, as those of channels merged with a batch are."""

    def of_label(self, label: Label) -> Tensor | None:
        """Return bool [positions], or None where all stay."""


class Site:
    """One node of the narrow graph, with its arguments before and after the cut."""

    def __init__(self, module: fx.GraphModule, node: fx.Node, kept: Kept, env: dict[fx.Node, Any]) -> None:
        self.module = module
        self.node = node
        self.kept = kept
        self.env = env

    def old(self, value: Any) -> Any:
        """Return an argument as it was before the cut: numbers, and `Labelled` for tensors."""
        return fx.node.map_arg(value, lambda n: self.kept.value(n.name))

    def now(self, value: Any) -> Any:
        """Return an argument as it is in the narrow graph: numbers, and meta tensors."""
        return fx.node.map_arg(value, lambda n: self.env[n])

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by position or name."""
        if len(self.node.args) > position:
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def assign(self, position: int, name: str, value: Any) -> None:
        """Set an argument by position or name."""
        if len(self.node.args) > position:
            self.node.update_arg(position, value)
        else:
            self.node.update_kwarg(name, value)

    def put_before(self, node: fx.Node, value: Any) -> fx.Node:
        """Give a node that was inserted before this one its value in the narrow graph."""
        self.env[node] = value
        record_shape(node, on_meta(value))
        return node

    def computed(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Insert a computation of numbers before the node."""
        with self.node.graph.inserting_before(self.node):
            made = self.node.graph.call_function(function, args)
        return self.put_before(made, function(*self.now(args)))

    def item(self, sizes: fx.Node, position: int) -> fx.Node:
        """Return a node that reads one of several sizes."""
        return self.computed(operator.getitem, sizes, position)

    def scaled(self, number: fx.Node, numerator: int, denominator: int) -> fx.Node:
        """Return a node for `number` × `numerator` / `denominator`, where that is a whole number."""
        return self.computed(operator.floordiv, self.computed(operator.mul, number, numerator), denominator)

    @property
    def x(self) -> Labelled:
        """The first argument before the cut."""
        value = self.subject
        assert isinstance(value, Labelled)
        return value

    @property
    def subject(self) -> Any:
        """The first argument before the cut, whatever it is."""
        return self.kept.value(self.args[0].name)

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments."""
        return self.node.args

    @property
    def result(self) -> Any:
        """The value of the node before the cut."""
        return self.kept.value(self.node.name)

    @property
    def predicted(self) -> list[tuple[int, ...]]:
        """Shapes of the node's tensors after the cut."""
        return self.kept.shapes(self.node.name)

    def kept_of(self, value: Labelled, dim: int) -> Tensor | None:
        """Return which positions of a dimension stay, None for all."""
        return self.kept.of_label(value.labels[dim])


Rewrite = Callable[[Site], None]
"""Makes the arguments of one node right for the narrow graph."""


def operator_of(node: fx.Node) -> str:
    """Return an operator's plain name: `view` for a method, a torch function or an ATen overload.

    A function from elsewhere keeps the name of its module, so that no `view` of somebody's passes for torch's.
    """
    if node.op == "call_method":
        return str(node.target)
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    name, home = getattr(target, "__name__", str(target)), getattr(target, "__module__", None) or "torch"
    return name if home.partition(".")[0] in ("torch", "_operator", "builtins") else f"{home}.{name}"
