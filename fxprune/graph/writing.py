"""Which nodes of a graph write into the values of others, and which values have memory of their own."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

__all__ = ["is_new", "own_memory", "writes_into"]

_WRITING = frozenset(
    [
        *(operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv),
        *(operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor),
        *(operator.ilshift, operator.irshift),
    ]
)
"""Operators that write into their first argument."""

_NEW = frozenset([operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, operator.neg])
"""Operators whose result shares no memory with any argument."""


def writes_into(node: fx.Node, named: Mapping[str, Any]) -> Iterator[fx.Node]:
    """Yield the inputs of a node that it may write into; `named` is what the graph names, modules among it."""
    first = node.all_input_nodes[:1]
    if node.op == "call_module":
        leaf = named[str(node.target)]
        is_known = type(leaf).__module__.startswith("torch.nn.")
        yield from (first if getattr(leaf, "inplace", False) else ()) if is_known else node.all_input_nodes
    elif node.op in ("call_method", "call_function"):
        if node.target in _WRITING or _is_named_so(node) or _is_in_place(node):
            yield from first
        yield from (n for n in node.all_input_nodes if n is node.kwargs.get("out"))


def _is_named_so(node: fx.Node) -> bool:
    """Whether a function or method is called like `add_`, an overload of ATen like `add_.Tensor`."""
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    return name.endswith("_") and not name.endswith("__")


def _is_in_place(node: fx.Node) -> bool:
    """Whether a function is called with `inplace=True`."""
    if node.op != "call_function" or not callable(node.target):
        return False
    try:
        given = inspect.signature(node.target).bind_partial(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # a builtin function, none of which takes `inplace`
        return False
    return bool(given.get("inplace", False))


def is_new(node: fx.Node, named: Mapping[str, Any]) -> bool:
    """Whether the value of a node certainly shares no memory with its inputs."""
    if node.op == "call_module":
        leaf: nn.Module = named[str(node.target)]
        return type(leaf).__module__.startswith("torch.nn.") and bool(leaf._parameters)
    return node.op == "call_function" and node.target in _NEW


def own_memory(node: fx.Node, named: Mapping[str, Any]) -> set[fx.Node]:
    """Return a node and those before it whose memory its value may lie in."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        source = pending.pop()
        if source not in found:
            found.add(source)
            pending += () if is_new(source, named) else source.all_input_nodes
    return found
