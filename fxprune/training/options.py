"""The options of a training run, as data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch.optim import Optimizer

from fxprune.errors import SpecError, nearest

__all__ = ["SCHEDULES", "Training"]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda fraction: (1 + math.cos(math.pi * fraction)) / 2,
    "constant": lambda fraction: 1.0,  # noqa: ARG005
}
"""Factor on the learning rate at a fraction of the planned steps, by name."""

OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("no", "bf16", "fp16")
OPTIONAL = ("clip_norm", "steps_per_epoch", "tolerance")


@dataclass(frozen=True)
class Training:
    """How to train.

    * `epochs`: at most so many; `steps_per_epoch` cuts each short (needed where the batches have no length).
    * `optimizer`: "sgd" (with `momentum` and `nesterov`), "adamw", or a callable from parameter groups to an
      Optimizer. The groups come with "lr" and "weight_decay". `weight_decay` acts on every parameter that no hook
      claims, biases and norms included.
    * `schedule`: "cosine" (from `learning_rate` to 0 over the planned steps), "constant", or a callable from the
      fraction of the planned steps that has been taken, in [0, 1), to a factor.
    * `clip_norm`: the largest norm of the whole gradient; None does not clip.
    * `tolerance`, `smoothing`: the stop rule, see `fxprune.training.stopping`; a tolerance of None trains all epochs.
      It acts only with validation data.
    * `keep_best`: end with the weights of the epoch with the lowest validation loss, rather than with the last ones.
      Turn it off where the loss that is validated is not the goal alone, as when hooks push towards a smaller model.
    * `seed`: of Python's, numpy's and torch's generators and of the order of samples.
    * `mixed_precision`: "no", "bf16" or "fp16". It counts, whatever `accelerate launch` was told.

    Raises `SpecError` for a value that cannot be trained with.
    """

    epochs: int
    learning_rate: float = 0.01
    optimizer: str | Callable[[list[dict[str, Any]]], Optimizer] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: str | Callable[[float], float] = "cosine"
    clip_norm: float | None = None
    steps_per_epoch: int | None = None
    tolerance: float | None = 1e-4
    smoothing: float = 0.9
    keep_best: bool = True
    seed: int = 0
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch"):
            self._check(name, lambda v: isinstance(v, int) and v >= 1, "a whole number, 1 or more")
        for name in ("learning_rate", "clip_norm"):
            self._check(name, lambda v: 0 < v < math.inf, "a number above 0")
        for name in ("weight_decay", "tolerance"):
            self._check(name, lambda v: 0 <= v < math.inf, "a number, 0 or more")
        for name in ("momentum", "smoothing"):
            self._check(name, lambda v: 0 <= v < 1, "a number in [0, 1)")
        self._check("seed", lambda v: isinstance(v, int) and 0 <= v < 2**32, "a whole number in [0, 2**32)")
        self._check("nesterov", lambda v: not v or self.momentum > 0, "False where momentum is 0")
        self._check_word("optimizer", OPTIMIZERS, "a callable from parameter groups to an Optimizer")
        self._check_word("schedule", tuple(SCHEDULES), "a callable from a fraction to a factor")
        self._check_word("mixed_precision", PRECISIONS, None)

    def _check(self, name: str, is_legal: Callable[[Any], bool], legal: str) -> None:
        value = getattr(self, name)
        if value is None and name in OPTIONAL:
            return
        if not isinstance(value, int | float) or not is_legal(value):
            also = ", or None" if name in OPTIONAL else ""
            raise SpecError(f"{name} is {value!r}; give {legal}{also}")

    def _check_word(self, name: str, words: tuple[str, ...], otherwise: str | None) -> None:
        value = getattr(self, name)
        if value in words or (otherwise is not None and callable(value)):
            return
        hint = nearest(str(value), words)
        raise SpecError(f"{name} is {value!r}; {hint}" + (f"; or give {otherwise}" if otherwise else ""))

    def factor(self, fraction: float) -> float:
        """Return the factor on the learning rate when `fraction` of the planned steps has been taken.

        >>> Training(epochs=1).factor(0.5)
        0.5
        """
        schedule = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        return schedule(fraction)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values; a callable becomes its dotted name.

        >>> Training(epochs=3, schedule=math.sqrt).to_dict()["schedule"]
        'math.sqrt'
        """
        return {field.name: _spelled(getattr(self, field.name)) for field in fields(self)}


def _spelled(value: Any) -> Any:
    if not callable(value):
        return value
    kind = type(value) if not hasattr(value, "__qualname__") else value
    return f"{kind.__module__}.{kind.__qualname__}"
