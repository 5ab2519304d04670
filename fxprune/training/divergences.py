"""How far a module's outputs are from those of a teacher: tensors of any number and nesting, to one scalar."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from fxprune.errors import InputError, SpecError, nearest

__all__ = ["DIVERGENCES", "Comparison", "Divergence", "is_number"]


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) of softmax over dim 1, the mean over samples and positions."""
    if student.ndim < 2 or student.shape[1] < 2:
        raise InputError(
            f"the divergence 'kl' compares classes along dim 1, and an output {list(student.shape)} has none there; "
            "give divergence='mse', or a function of your own"
        )
    ours, theirs = (functional.log_softmax(logits, dim=1) for logits in (student, teacher))
    return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1).mean()


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference."""
    return (student - teacher).square().mean()


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": _kl, "mse": _mse}
"""(student, teacher) → scalar, by name: for logits [samples, classes, …]; for outputs that are no logits, such as
images. Both tensors have one shape and are float32 at least."""

Divergence = str | Callable[[Any, Any], Tensor]
"""A name of `DIVERGENCES`, or (outputs of the student, outputs of the teacher) → scalar."""


@dataclass(frozen=True)
class Comparison:
    """A divergence and its temperature. Raises `SpecError` for ones that do not exist."""

    divergence: Divergence = "kl"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.divergence) and self.divergence not in DIVERGENCES:
            hint = nearest(str(self.divergence), DIVERGENCES)
            raise SpecError(f"unknown divergence {self.divergence!r}; {hint}, or give a function")
        if not is_number(self.temperature) or not 0 < self.temperature < math.inf:
            raise SpecError(f"temperature is {self.temperature!r}; give a number above 0")
        if self.divergence != "kl" and self.temperature != 1:
            raise SpecError(f"temperature is {self.temperature}, and only the divergence 'kl' has one; leave it out")

    def __str__(self) -> str:
        name = getattr(self.divergence, "__qualname__", self.divergence)
        return f"{name}, temperature={float(self.temperature)}"

    def between(self, output: Any, answer: Any, teacher: str) -> Tensor:
        """Return the divergence of outputs from the answer of a teacher; by name, summed over all floating tensors.

        At a temperature T it is T² times that of outputs over T.

        Raises `InputError`, which names the teacher, when the outputs cannot be compared; `SpecError` when a function
        returns no scalar.
        """
        output, answer = pytree.tree_map_only(Tensor, _precise, (output, answer))
        if isinstance(self.divergence, str):
            pairs = _pairs(_leaves(output), _leaves(answer), teacher)
            measure, t = DIVERGENCES[self.divergence], self.temperature
            return t**2 * torch.stack([measure(ours / t, theirs / t) for ours, theirs in pairs]).sum()
        value = self.divergence(output, answer)
        if not isinstance(value, Tensor) or value.ndim:
            shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise SpecError(f"the divergence returned {shown}; return a scalar tensor, such as the mean over samples")
        return value


def is_number(value: object) -> bool:
    """Whether an option is a number: True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def _leaves(output: Any) -> dict[str, Tensor]:
    """Return the floating tensors of an output by where in it they are."""
    found = ((pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(output)[0])
    return {path: leaf for path, leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()}


def _pairs(output: Mapping[str, Tensor], answer: Mapping[str, Tensor], teacher: str) -> list[tuple[Tensor, Tensor]]:
    """Return which tensors to compare. Raises `InputError` unless both sides have the same ones."""
    ours, theirs = ({path: list(leaf.shape) for path, leaf in side.items()} for side in (output, answer))
    if ours != theirs or not ours:
        raise InputError(
            f"{teacher} gives {_shown(theirs)} where the module gives {_shown(ours)}; give one whose outputs are "
            "alike, wrap it to make them so, or give a divergence of your own: (student, teacher) → scalar"
        )
    return [(leaf, answer[path]) for path, leaf in output.items()]


def _shown(shapes: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{path} {shape}".strip() for path, shape in shapes.items()) or "no floating tensors"
