"""Operators that reduce or mix dimensions.

A zero adds nothing to a sum or a norm, so they absorb their channels. A mean does too where surgery can keep its
divisor. A variance or an extremum sees other values once a channel is gone: statistical. What gives positions as
numbers (`argmax`), or for which zero is no neutral value, pins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fxprune.labels.call import Call, Rule, normalised
from fxprune.labels.flow import Labels

__all__ = ["RULES"]

Fact = Callable[[Call, int], None]
"""States what an operator does to one labelled dimension that it reduces."""


def _reduced_dims(call: Call) -> set[int]:
    """Return the dimensions that the call reduces, all of them where none is given."""
    given: Any = call["dim"] if call.accepts("dim") else None
    x = call["self"]
    if given is None or given == []:
        return set(range(x.dim()))
    return {normalised(d, x.dim()) for d in (given if isinstance(given, (list, tuple)) else [given])}


def _for_each_result(call: Call, labels: Labels) -> Labels | list[Labels]:
    return labels if isinstance(call.result, Tensor) else [labels for _ in call.result]


def reducing(state: Fact) -> Rule:
    """Make a rule that states a fact about every labelled dimension it reduces; the others pass."""

    def rule(call: Call) -> Labels | list[Labels]:
        x = call["self"]
        labels, dims = call.labels(x), _reduced_dims(call)
        for d in dims:
            if labels[d] is not None:
                state(call, d)
        first = call.result if isinstance(call.result, Tensor) else call.result[0]
        keeps = first.dim() == x.dim()
        out = tuple(None if d in dims else label for d, label in enumerate(labels) if keeps or d not in dims)
        return _for_each_result(call, out)

    rule.__doc__ = state.__doc__
    return rule


def _absorb(call: Call, dim: int) -> None:
    """Summed dimensions are absorbed exactly: a zero adds nothing."""
    call.absorb(call["self"], dim)


def _statistical(call: Call, dim: int) -> None:
    """Reduced dimensions are statistical: the others see another value once a channel is gone."""
    call.flow.mark_statistical(call.labels(call["self"])[dim], "a statistic is taken over this dimension")


def _pin(call: Call, dim: int) -> None:
    """Reduced dimensions are pinned: a zero is not a removal."""
    call.flow.pin(call.labels(call["self"])[dim], "reduced by an operator for which a zero is not a removal")


def _mean(call: Call, dim: int) -> None:
    """Absorbed exactly where the mean is a node of its own, whose divisor surgery keeps; statistical elsewhere."""
    (_absorb if call.is_whole_node else _statistical)(call, dim)


def _norm(call: Call, dim: int) -> None:
    """Absorbed exactly for an order p >= 0, ∞ included: a zero adds nothing. It decides one of order p < 0: pinned."""
    order = call["ord" if call.accepts("ord") else "p"]
    if order is not None and order < 0:
        _pin(call, dim)
    elif call.source(call["self"]) is None:
        _statistical(call, dim)
    else:
        _absorb(call, dim)


def _extremum(call: Call, dim: int) -> None:
    """Statistical where the value comes alone; pinned where its position comes with it, whose number would change."""
    if isinstance(call.result, Tensor):
        _statistical(call, dim)
    else:
        call.flow.pin(call.labels(call["self"])[dim], "its positions are given as numbers")


def mixing(call: Call) -> Labels | list[Labels]:
    """`softmax`, `cumsum`, `sort` along one dimension: that one is pinned, the others pass."""
    x = call["self"]
    labels, dims = call.labels(x), _reduced_dims(call)
    for d in dims:
        call.flow.pin(labels[d], "every position of this dimension depends on the others")
    return _for_each_result(call, tuple(None if d in dims else label for d, label in enumerate(labels)))


RULES: dict[str, Rule] = {
    **dict.fromkeys(["aten.sum", "aten.nansum"], reducing(_absorb)),
    "aten.mean": reducing(_mean),
    **dict.fromkeys(["aten.linalg_vector_norm", "aten.norm"], reducing(_norm)),
    **dict.fromkeys(
        [
            *("aten.var", "aten.std", "aten.var_mean", "aten.std_mean"),
            *("aten.amax", "aten.amin", "aten.aminmax", "aten.logsumexp"),
        ],
        reducing(_statistical),
    ),
    **dict.fromkeys(["aten.max", "aten.min", "aten.median", "aten.nanmedian"], reducing(_extremum)),
    **dict.fromkeys(["aten.kthvalue", "aten.mode"], reducing(_extremum)),
    **dict.fromkeys(["aten.argmax", "aten.argmin", "aten.prod", "aten.any", "aten.all"], reducing(_pin)),
    **dict.fromkeys(
        [
            *("aten._softmax", "aten._log_softmax", "aten._safe_softmax"),
            *("aten.cumsum", "aten.cumprod", "aten.cummax", "aten.cummin", "aten.logcumsumexp"),
            *("aten.sort", "aten.argsort", "aten.topk"),
        ],
        mixing,
    ),
}
