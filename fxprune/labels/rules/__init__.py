"""ATen operator → how labels flow through it, a table for each family.

`RULES` maps an operator's name without overload (`aten.add`) to its rule. To add an operator, add one entry to the
table of its family. An in-place operator follows its out-of-place twin; an operator that PyTorch tags as pointwise
follows `pointwise`; anything else pins every channel that meets it.
"""

from __future__ import annotations

import functools

import torch
from torch._ops import OpOverload

from fxprune.labels.call import Rule
from fxprune.labels.rules import (
    contraction,
    creation,
    indexing,
    movement,
    normalisation,
    pointwise,
    reduction,
    refusal,
    reshaping,
    sampling,
    spatial,
    spectral,
)

__all__ = ["FAMILIES", "RULES", "find_rule", "operator_name"]

FAMILIES: dict[str, dict[str, Rule]] = {
    "pointwise": pointwise.RULES,
    "contraction": contraction.RULES,
    "movement": movement.RULES,
    "reshaping": reshaping.RULES,
    "spatial": spatial.RULES,
    "sampling": sampling.RULES,
    "indexing": indexing.RULES,
    "spectral": spectral.RULES,
    "normalisation": normalisation.RULES,
    "reduction": reduction.RULES,
    "creation": creation.RULES,
    "refusal": refusal.RULES,
}
RULES: dict[str, Rule] = {name: rule for table in FAMILIES.values() for name, rule in table.items()}


@functools.cache
def operator_name(operator: OpOverload) -> str:
    """Return the name without overload: `aten.add` for `aten.add.Tensor`.

    >>> operator_name(torch.ops.aten.add.Tensor)
    'aten.add'
    """
    return f"{operator.namespace}.{operator._schema.name.split('::')[1]}"


@functools.cache
def find_rule(operator: OpOverload) -> Rule | None:
    """Return the rule of an operator, None where there is none and its channels must be pinned."""
    if torch.Tag.pointwise in operator.tags:
        return pointwise.pointwise
    name = operator_name(operator)
    twin = name.removesuffix("_")
    if twin != name and torch.Tag.pointwise in _tags(twin, operator._overloadname):
        return pointwise.pointwise
    return RULES.get(name) or RULES.get(twin)


def _tags(name: str, overload: str) -> list[torch.Tag]:
    """Return the tags of an operator, none where it does not exist."""
    namespace, _, plain = name.partition(".")
    packet = getattr(getattr(torch.ops, namespace), plain, None)
    return list(getattr(getattr(packet, overload, None), "tags", ()))
