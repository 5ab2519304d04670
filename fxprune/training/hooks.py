"""What a job adds to training: its own parameter groups, a penalty on the loss, and actions after steps and epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fxprune.training.history import Record

__all__ = ["Hook", "Moment"]


@dataclass(frozen=True)
class Moment:
    """A point in training.

    `epoch` counts from 1 and is the one under way; `step` is how many optimizer steps have been taken, of `steps`
    planned in all (an early stop takes fewer). `measure()` measures the module on the validation data as it is now,
    without a trace in the run (modes, random numbers): every process must call it, and it raises `UsageError` when
    training has no validation data.
    """

    epoch: int
    step: int
    steps: int
    measure: Callable[[], Mapping[str, float]] = field(repr=False, compare=False)

    @property
    def fraction(self) -> float:
        """The part of the planned steps that has been taken, in [0, 1].

        >>> Moment(epoch=2, step=15, steps=40, measure=dict).fraction
        0.375
        """
        return self.step / self.steps


class Hook:
    """A job's part in training; override what it needs, every method does nothing by itself.

    `name` is unique among the hooks of a run: its state is kept under it, and a stop is attributed to it. `module` is
    always the caller's own module, never a wrapper, and already on the device that trains. Methods run on every
    process alike.
    """

    name = "hook"

    def settings(self) -> dict[str, Any]:
        """Return what must be the same when a run is resumed, as JSON values; a run with others is refused."""
        return {}

    def parameter_groups(self, module: nn.Module, learning_rate: float) -> list[dict[str, Any]]:  # noqa: ARG002
        """Return the parameter groups that this hook claims: they leave the main group.

        As in torch.optim, a group is {"params": […], "lr": …, …}. Its "lr" (the run's `learning_rate` if absent) is
        scheduled like the main group's; "weight_decay" is the run's if absent. Called once, before the first step.
        """
        return []

    def before_epoch(self, module: nn.Module, moment: Moment) -> None:
        """Act before an epoch, just after `module.train()`: the place to freeze batch norms."""

    def penalty(self, module: nn.Module, moment: Moment) -> Tensor | None:  # noqa: ARG002
        """Return a scalar to add to the loss of this step, or None.

        Called after the forward run of the step and outside autocast; `moment.step` does not count this step yet.
        """
        return None

    def after_step(self, module: nn.Module, moment: Moment) -> None:
        """Act after an optimizer step, which `moment.step` counts."""

    def columns(self, module: nn.Module, moment: Moment) -> Mapping[str, float]:  # noqa: ARG002
        """Return the numbers that this hook adds to the log row of the epoch that has just ended."""
        return {}

    def after_epoch(self, module: nn.Module, moment: Moment, record: Record) -> bool:  # noqa: ARG002
        """Act after an epoch and its validation; `record` is its row of the log. Return True to stop training."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what the hook must get back when a killed run is resumed.

        Tensors, numbers, strings, and lists and dicts of them. What lives in the module's state_dict is saved anyway.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
