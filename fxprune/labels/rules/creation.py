"""Operators that make constant tensors from sizes: their positions are slots of no parameter, dropped freely."""

from __future__ import annotations

from fxprune.labels.call import Call, Rule
from fxprune.labels.flow import Labels

__all__ = ["RULES", "constant"]


def constant(call: Call) -> Labels:
    """Every dimension of a tensor that is equal everywhere gets fresh slots; its sizes are re-derived by surgery."""
    return tuple(call.made(size) for size in call.result.shape)


RULES: dict[str, Rule] = {
    "aten.zeros": constant,
    "aten.ones": constant,
    "aten.full": constant,
    "aten.empty": constant,
    "aten.new_zeros": constant,
    "aten.new_ones": constant,
    "aten.new_full": constant,
    "aten.new_empty": constant,
}
