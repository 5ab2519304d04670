"""Operators that reduce dimensions: a sum absorbs its channels, a mean is statistical, an extremum pins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fxprune.labels.call import Call, Rule, normalised
from fxprune.labels.flow import Labels

__all__ = ["RULES"]


def _reduced_dims(call: Call) -> set[int]:
    """Return the dimensions that the call reduces, all of them where none is given."""
    given: Any = call["dim"] if call.accepts("dim") else None
    x = call["self"]
    if given is None or given == []:
        return set(range(x.dim()))
    return {normalised(d, x.dim()) for d in (given if isinstance(given, (list, tuple)) else [given])}


def reducing(state: Callable[[Call, int], None]) -> Rule:
    """Make a rule that states a fact about every labelled dimension it reduces; the others pass."""

    def rule(call: Call) -> Labels | list[Labels]:
        x = call["self"]
        labels, dims = call.labels(x), _reduced_dims(call)
        for d in dims:
            if labels[d] is not None:
                state(call, d)
        results = [call.result] if isinstance(call.result, Tensor) else list(call.result)
        keeps = results[0].dim() == x.dim()
        out = tuple(None if d in dims else label for d, label in enumerate(labels) if keeps or d not in dims)
        return out if isinstance(call.result, Tensor) else [out for _ in results]

    return rule


def _absorb(call: Call, dim: int) -> None:
    call.absorb(call["self"], dim)


def _statistical(call: Call, dim: int) -> None:
    call.flow.mark_statistical(call.labels(call["self"])[dim], "a statistic is taken over this dimension")


def _pin(call: Call, dim: int) -> None:
    call.flow.pin(call.labels(call["self"])[dim], "reduced by an operator for which a zero is not a removal")


def passing(call: Call) -> Labels:
    """`softmax`, `cumsum` along one dimension: that one is pinned, the others pass."""
    x = call["self"]
    labels, dims = call.labels(x), _reduced_dims(call)
    for d in dims:
        call.flow.pin(labels[d], "every position of this dimension depends on the others")
    return tuple(None if d in dims else label for d, label in enumerate(labels))


RULES: dict[str, Rule] = {
    "aten.sum": reducing(_absorb),
    **dict.fromkeys(
        ["aten.mean", "aten.var", "aten.std", "aten.var_mean", "aten.std_mean", "aten.linalg_vector_norm", "aten.norm"],
        reducing(_statistical),
    ),
    **dict.fromkeys(
        [
            *("aten.amax", "aten.amin", "aten.max", "aten.min", "aten.argmax", "aten.argmin"),
            *("aten.prod", "aten.any", "aten.all", "aten.logsumexp", "aten.median"),
        ],
        reducing(_pin),
    ),
    **dict.fromkeys(
        ["aten._softmax", "aten._log_softmax", "aten._safe_softmax", "aten.cumsum", "aten.cumprod", "aten.sort"],
        passing,
    ),
}
