"""Where a zero of an operator's input is a zero of its result: a mask before it then acts as one behind it."""

from __future__ import annotations

import functools
from typing import Any

from torch._ops import OpOverload

from fxprune.labels.rules import FAMILIES, operator_name

__all__ = ["joins", "keeps_zeros"]

_ZERO_TO_ZERO = {"aten.mul", "aten.relu", "aten.neg", "aten.abs", "aten._to_copy", "aten.clone", "aten.constant_pad_nd"}


def keeps_zeros(operator: OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether a zero of the input is a zero of the result at the place where its label goes."""
    # Padding may put something else than zero beside the zeros of a channel.
    pads_by_a_value = operator_name(operator) == "aten.constant_pad_nd" and any(args[2:3])
    return _maps_zero_to_zero(operator) and not pads_by_a_value


@functools.cache
def _maps_zero_to_zero(operator: OpOverload) -> bool:
    name = operator_name(operator).removesuffix("_")
    families = (FAMILIES["movement"], FAMILIES["reshaping"], FAMILIES["spatial"], _ZERO_TO_ZERO)
    return any(name in family for family in families)


def joins(operator: OpOverload) -> bool:
    """Whether a result is zero only where each part comes from the one input; a product is where any factor is."""
    return operator_name(operator) in ("aten.cat", "aten.stack")
