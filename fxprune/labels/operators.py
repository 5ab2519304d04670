"""What the rule table says of operators, in words: for the generated page docs/operators.md and for questions."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch._ops import OpOverload

from fxprune.errors import SpecError, nearest
from fxprune.labels.call import Rule
from fxprune.labels.rules import FAMILIES, RULES, find_rule, operator_name

__all__ = ["NOTES", "OperatorRow", "describe_operator", "operator_rows"]

NOTES = (
    "An operator that PyTorch tags as pointwise (torch.Tag.pointwise) follows the rule `pointwise` without an entry.",
    "An in-place operator follows its out-of-place twin: aten.relu_ does as aten.relu.",
    "An operator that PyTorch decomposes (aten.linear, aten.matmul) is seen as what it decomposes into.",
    "Any other operator has no rule: every channel that meets it is pinned, and `fxprune inspect` names it.",
)


@dataclass(frozen=True)
class OperatorRow:
    """An operator, the family of its rule (or `composite`, or `none`), and what happens to labels there."""

    operator: str
    family: str
    does: str


def operator_rows() -> list[OperatorRow]:
    """Return every operator of the rule table, by family."""
    return [
        OperatorRow(name, family, _does(rule)) for family, table in FAMILIES.items() for name, rule in table.items()
    ]


def describe_operator(name: str) -> list[OperatorRow]:
    """Return what becomes of labels at one operator: one row, or one for every overload where they differ.

    Args:
        name: `aten.add`, `add`, `aten::add` or a single overload as `aten.add.Tensor`.

    Raises `SpecError` naming the nearest operator when there is none of that name.

    >>> [row.family for row in describe_operator("aten.relu_")]
    ['pointwise']
    """
    known = _overloads()
    full = name.replace("::", ".")
    full = full if full.partition(".")[0] in {other.partition(".")[0] for other in (*RULES, *known)} else f"aten.{full}"
    found = _found(full, known)
    if not found and full in RULES:  # of a library that is not loaded
        return [row for row in operator_rows() if row.operator == full]
    if not found:
        raise SpecError(f"PyTorch has no operator '{name}'; {nearest(full, sorted({*RULES, *known}))}")
    rows = [_row(operator) for operator in found]
    is_one = len({(row.family, row.does) for row in rows}) == 1
    return [replace(rows[0], operator=full)] if is_one else rows


def _overloads() -> dict[str, list[str]]:
    """Return every operator that PyTorch knows now, `aten.add` → names of its overloads."""
    found: dict[str, list[str]] = defaultdict(list)
    for qualified in sorted(torch._C._dispatch_get_all_op_names()):
        namespace, _, rest = qualified.partition("::")
        plain, _, overload = rest.partition(".")
        found[f"{namespace}.{plain}"].append(overload or "default")
    return found


def _found(full: str, known: Mapping[str, Sequence[str]]) -> list[OpOverload]:
    """Return the overloads of an operator but those that write to `out`, or the one overload that is named."""
    packet, _, overload = full.rpartition(".")
    if overload in known.get(packet, ()):
        return [_operator(packet, overload)]
    return [o for o in (_operator(full, name) for name in known.get(full, ())) if not _writes_out(o)]


def _operator(packet: str, overload: str) -> OpOverload:
    namespace, _, plain = packet.partition(".")
    found = getattr(getattr(getattr(torch.ops, namespace), plain), overload)
    assert isinstance(found, OpOverload)
    return found


def _writes_out(operator: OpOverload) -> bool:
    return any(argument.is_out for argument in operator._schema.arguments)


def _row(operator: OpOverload) -> OperatorRow:
    rule, name = find_rule(operator), operator_name(operator)
    if rule is None:
        is_composite = operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        return OperatorRow(str(operator), *(_COMPOSITE if is_composite else _NONE))
    for entry, note in ((name, ""), (name.removesuffix("_"), " As its out-of-place twin.")):
        for family, table in FAMILIES.items():
            if table.get(entry) is rule:
                return OperatorRow(str(operator), family, _does(rule) + note)
    return OperatorRow(str(operator), "pointwise", _does(rule) + " Tagged as pointwise by PyTorch.")


_COMPOSITE = ("composite", "PyTorch decomposes it: labels flow through what it calls.")
_NONE = ("none", "No rule: every channel that meets it is pinned.")


def _does(rule: Rule) -> str:
    """Return the first line of a rule's docstring, that of its table where a function made the rule."""
    text = rule.__doc__ or sys.modules[rule.__module__].__doc__ or ""
    return text.strip().splitlines()[0]
