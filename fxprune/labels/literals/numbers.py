"""3. Numbers that are no sizes: a scale, a divisor keep the value that they had."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from fxprune.labels.literals.site import Site, operator_of

__all__ = ["attention", "freeze_numbers", "freeze_values", "mean"]

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
    site.node.args = _frozen(site, site.node.args, (int, float))
    site.node.kwargs = _frozen(site, site.node.kwargs, (int, float))


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
        return before if is_number and before != site.env[n] else n

    return fx.node.map_arg(arguments, freeze)


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
