"""3. Numbers that are no sizes: a scale, a divisor keep the value that they had."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from fxprune.labels.flow import Labelled
from fxprune.labels.literals.site import Site, operator_of

__all__ = ["assertion", "attention", "freeze_numbers", "freeze_values", "mean"]

_VALUES = {
    "full": (1, "fill_value"),
    "new_full": (2, "fill_value"),
    "setitem": (2, "value"),
    **dict.fromkeys(["pad", "_pad"], (3, "value")),
    "constant_pad_nd": (2, "value"),
}
"""Operator → the argument that is a value, though others are sizes or positions."""


def freeze_numbers(site: Site) -> None:
    """Keep the numbers that a tensor operator without sizes read."""
    site.node.args = _frozen(site, site.node.args, (int, float, tuple))
    site.node.kwargs = _frozen(site, site.node.kwargs, (int, float, tuple))


def freeze_values(site: Site) -> None:
    """Keep the numbers that are no sizes of an operator that has sizes: fractions, and what `_VALUES` names."""
    site.node.args = _frozen(site, site.node.args, (float,))
    site.node.kwargs = _frozen(site, site.node.kwargs, (float,))
    place = _VALUES.get(operator_of(site.node))
    if place is not None and site.argument(*place) is not None:
        site.assign(*place, _frozen(site, site.argument(*place), (int, float)))


def _frozen(site: Site, arguments: Any, kinds: tuple[type, ...]) -> Any:
    def freeze(n: fx.Node) -> Any:
        before = site.kept.value(n.name)
        is_number = isinstance(before, kinds) and not isinstance(before, bool)
        return _as_before(site, n) if is_number and not _holds_tensors(before) else n

    return fx.node.map_arg(arguments, freeze)


def _holds_tensors(value: Any) -> bool:
    leaves = pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, Labelled))
    return any(isinstance(leaf, Labelled) for leaf in leaves)


def _as_before(site: Site, n: fx.Node) -> Any:
    """Return numbers as they were before the cut: a literal, or computed anew where they depend on a batch as well.

    1. What the cut left alone stays computed.
    2. Sizes of a tensor: those of channels become literals.
    3. A count of all elements grows with the batch as it did.
    4. What is computed from numbers is computed from those before the cut.
    """
    before, now = site.kept.value(n.name), site.env[n]
    reads_tensors = any(_holds_tensors(site.kept.value(i.name)) for i in n.all_input_nodes)
    if before == now:  # 1.
        return n
    if reads_tensors and isinstance(before, tuple):  # 2.
        return [b if b != size else site.item(n, i) for i, (b, size) in enumerate(zip(before, now, strict=True))]
    if operator_of(n) in _COUNTS:  # 3.
        return site.scaled(n, before, now)
    if reads_tensors:  # 2.
        return before
    return _from_numbers_before(site, n, before)


def _from_numbers_before(site: Site, n: fx.Node, before: Any) -> Any:
    """4. Compute a number again from numbers before the cut, or return it where those are literals."""
    arguments: Any = fx.node.map_arg((n.args, n.kwargs), lambda i: _as_before(site, i))
    args, kwargs = arguments
    function: Any = n.target
    if function is operator.getitem and isinstance(args[0], list):
        return args[0][args[1]]
    if n.op != "call_function" or not _nodes(arguments):
        return before
    with site.node.graph.inserting_before(site.node):
        made = site.node.graph.call_function(function, args, kwargs)
    return site.put_before(made, before)


_COUNTS = ("numel", "nelement")


def _nodes(*arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, found.append)
    return found


def assertion(site: Site) -> None:
    """`torch._assert(condition, message)`: what was asserted of the sizes before the cut held."""
    condition = site.argument(0, "condition")
    if isinstance(site.old(condition), bool):
        site.assign(0, "condition", site.old(condition))


def attention(site: Site) -> None:
    """`scaled_dot_product_attention`: the default scale is that of the width before the cut."""
    width = site.x.shape[-1]
    if site.node.kwargs.get("scale") is None and site.now(site.node.args[0]).shape[-1] != width:
        site.node.update_kwarg("scale", width**-0.5)


def mean(site: Site) -> None:
    """`mean(x, dims)` over fewer positions: still divided by the old count, which is `mean(x, dims) * (kept / old)`."""
    old = _terms(site.x.shape, site.result.shape)
    now = _terms(site.now(site.args[0]).shape, site.predicted[0])
    if now == old:
        return
    wide = site.node.meta["val"]
    with site.node.graph.inserting_before(site.node):
        over_kept = site.node.graph.node_copy(site.node)
    site.put_before(over_kept, wide.new_empty(site.predicted[0]))
    site.node.op, site.node.target = "call_function", operator.mul
    site.node.args, site.node.kwargs = (over_kept, now / old), {}


def _terms(before: Sequence[int], after: Sequence[int]) -> int:
    """Count the positions that one mean is taken over."""
    return math.prod(before) // max(math.prod(after), 1)
