"""Operators that pin all that they take, each with its reason; one without any rule pins as well, but says so."""

from __future__ import annotations

from torch import Tensor

from fxprune.labels.call import Call, Rule, nothing
from fxprune.labels.flow import Labels

__all__ = ["RULES"]

_REASONS = {
    "aten._cdist_forward": "distances between positions are taken",
    "aten._trilinear": "multiplied by two other tensors at once",
    "aten.affine_grid_generator": "parameters of an affine map",
    "aten.masked_scatter": "written one after another where a mask is set",
}
"""Operator → why nothing that meets it may leave."""


def pinning(text: str) -> Rule:
    """Make a rule that pins every argument and says why."""

    def rule(call: Call) -> Labels | list[Labels]:
        call.pin_all(text)
        return nothing(call.result) if isinstance(call.result, Tensor) else [nothing(r) for r in call.result]

    rule.__doc__ = f"Pinned: {text}."
    return rule


RULES: dict[str, Rule] = {name: pinning(text) for name, text in _REASONS.items()}
