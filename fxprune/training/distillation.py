"""Knowledge distillation: a module learns to answer as its teachers do, from the smallest to the largest.

ACPLI (paper 001), §5.2: "we train the network for K/N GPU hours with each of these teacher networks, starting with the
smallest one … Our loss is Lce + 5Lkd". Where it is silent, this is ours:

1. Lkd is the divergence of Hinton et al. 2015: T² · KL(teacher ‖ student) of softmax at a temperature T, by default 1.
2. Every teacher's share of the epochs is a run of its own: the learning rate falls anew, the stop rule looks at that
   run alone, and its seed is one higher than that of the run before, so that samples come in another order.
3. Whatever epoch is best on the validation data, over all runs, is what the next one starts from and what is left. The
   weights that the first one starts from are no candidate: the module can end worse than it began.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.callables import blaming
from fxprune.errors import InputError, SpecError
from fxprune.training.divergences import Comparison, Divergence, is_number
from fxprune.training.history import History
from fxprune.training.hooks import Hook, Moment
from fxprune.training.loop import train
from fxprune.training.objectives import Loss, Measure
from fxprune.training.options import Training
from fxprune.training.validation import modes_kept

__all__ = ["Distillation", "distill"]


class Distillation(Hook):
    """Draws the outputs of a module to those of a teacher on the same inputs.

        hook = Distillation(module, teacher)
        train(module, batches, hook.overheard(loss), options, hooks=[hook])

    Whatever the loss calls the module with, the teacher is called with just before. The penalty is `weight` times the
    divergence, the mean over all calls of the step. Calls without gradients, as in validation, do not count. The
    teacher answers in evaluation mode and in the precision of the run, learns nothing, and stays on the device that
    trains; `distill` brings it back.

    Args:
        module: what is going to be trained.
        teacher: any other module that takes the same inputs.
        weight: of the divergence in the loss.
        temperature: of the divergence "kl".
        divergence: "kl" for logits [samples, classes, …] or "mse", summed over all floating tensors where outputs are
            nested in tuples, lists and dicts; or a function (outputs of the student, of the teacher) → scalar.
        title: what messages call the teacher.

    Raises `SpecError` for options out of range, `InputError` for a teacher that would be trained with the module.
    """

    name = "distillation"

    def __init__(
        self,
        module: nn.Module,
        teacher: nn.Module,
        weight: float = 5.0,
        temperature: float = 1.0,
        divergence: Divergence = "kl",
        title: str = "the teacher",
    ) -> None:
        if not is_number(weight) or not 0 <= weight < math.inf:
            raise SpecError(f"weight is {weight!r}; give a number, 0 or more")
        kind, size = type(teacher).__name__, sum(parameter.numel() for parameter in teacher.parameters())
        self.title = f"{title} ({kind})"
        _check_apart(module, teacher, self.title)
        self.module, self.teacher, self.weight = module, teacher, float(weight)
        self.comparison = Comparison(divergence, temperature)
        self.size = f"{kind} of {size} parameters"
        self._answers: list[Any] = []
        self._divergences: list[Tensor] = []

    def settings(self) -> dict[str, Any]:
        """Return which teacher this is, as far as its size tells, and how much it counts."""
        return {"teacher": self.size, "divergence": str(self.comparison), "weight": self.weight}

    def overheard(self, loss: Loss) -> Loss:
        """Return the loss to train on: the same one, and the teacher hears what it asks the module."""

        def ours(module: nn.Module, batch: Any) -> Tensor:
            if not torch.is_grad_enabled():
                return loss(module, batch)
            self._divergences.clear()
            with self._listening():
                return loss(module, batch)

        return ours

    def before_epoch(self, module: nn.Module, moment: Moment) -> None:  # noqa: ARG002
        """Bring the teacher to the device that trains."""
        if module is not self.module:
            raise SpecError(f"the distillation from {self.title} is for another module; make one for this module")
        self.teacher.to(_device(module))

    def penalty(self, module: nn.Module, moment: Moment) -> Tensor:  # noqa: ARG002
        """Return the weighted divergence, the mean over the calls that the loss made."""
        if not self._divergences:
            raise InputError(
                "the loss did not call the module with gradients, so there is nothing to distil; let it call the "
                "module that it is given, and train on distillation.overheard(loss)"
            )
        mean = torch.stack(self._divergences).mean()
        self._divergences.clear()
        return self.weight * mean

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Ask the teacher whenever the module is called, for as long as the loss runs: no copy takes hooks along."""
        handles = (
            self.module.register_forward_pre_hook(self._ask, with_kwargs=True),
            self.module.register_forward_hook(self._compare),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._answers.clear()

    def _ask(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:  # noqa: ARG002
        if torch.is_grad_enabled():
            self._answers.append(self.answer(args, kwargs))

    def _compare(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        if torch.is_grad_enabled():
            self._divergences.append(self.comparison.between(output, self._answers.pop(), self.title))

    def answer(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what the teacher gives for these inputs. Raises `InputError` where it fails."""
        with modes_kept(self.teacher), torch.no_grad(), _autocast():
            self.teacher.eval()
            # Copies: what one of the two changes in place, the other shall not see.
            args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            with blaming(
                f"{self.title} fails on what the loss calls the module with",
                "; give one that can answer to the same inputs, or wrap it",
            ):
                return self.teacher(*args, **kwargs)


def distill(
    module: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    options: Training,
    *,
    teachers: Sequence[nn.Module] | nn.ModuleList,
    weight: float = 5.0,
    temperature: float = 1.0,
    divergence: Divergence = "kl",
    validation: Iterable[Any] | None = None,
    measure: Measure | None = None,
    hooks: Sequence[Hook] = (),
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[History, ...]:
    """Train `module` in place with one teacher after the other; return what happened with each (paper 001, §5.2).

    Each teacher has an equal share of the epochs, the last ones what is left over, and its share is a run of `train`
    on `loss` plus `weight` times the divergence from the teacher's outputs, which the log calls penalty. With
    validation data the module ends with the weights of the best epoch of all (`Training.keep_best`). Teachers are
    given back as they came.

    Args:
        module: what to train, usually a pruned model.
        batches: as in `train`, like `validation`, `measure` and `progress`.
        loss: (module, batch) → scalar. It must call the module; teachers are called with the same inputs.
        options: how to train; `epochs` are shared out.
        teachers: modules with outputs like those of `module`, the smallest first: usually the model before it was
            pruned, then larger ones.
        weight: of the divergence in the loss.
        temperature: of the divergence "kl".
        divergence: "kl" for logits, "mse" for other outputs such as images, or a function; see `Distillation`.
        validation: data to measure on.
        measure: what to measure.
        hooks: take part in every run.
        folder: makes the runs resumable, in its subfolders teacher-1, teacher-2, …
        progress: whether to show bars.

    Raises `SpecError` for options out of range, `InputError` for teachers that do not fit, and what `train` raises.
    """
    shares = _shares(options.epochs, teachers)
    lessons = [
        Distillation(module, teacher, weight, temperature, divergence, f"teachers[{place}]")
        for place, teacher in enumerate(teachers)
    ]
    histories: list[History] = []
    with _rehearsal(module, lessons[1:]):
        for number, (lesson, epochs) in enumerate(zip(lessons, shares, strict=True)):
            before = copy.deepcopy(module.state_dict()) if histories else {}
            with _device_kept(lesson.teacher):
                history = train(
                    module,
                    batches,
                    lesson.overheard(loss),
                    replace(options, epochs=epochs, seed=(options.seed + number) % 2**32),
                    validation=validation,
                    measure=measure,
                    hooks=[*hooks, lesson],
                    folder=None if folder is None else Path(folder) / f"teacher-{number + 1}",
                    progress=progress,
                )
            if options.keep_best and histories and not _is_better(history, histories):
                module.load_state_dict(before)
            histories.append(history)
    return tuple(histories)


def _check_apart(module: nn.Module, teacher: nn.Module, title: str) -> None:
    """Raise `InputError` for a teacher that training the module would change."""
    if teacher is module:
        raise InputError(f"{title} is the module itself; give a copy of it from before it was pruned")
    own = {id(tensor) for tensor in chain(teacher.parameters(), teacher.buffers())}
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if id(tensor) in own:
            raise InputError(f"{title} shares '{name}' with the module and would change with it; give a copy.deepcopy")


def _shares(epochs: int, teachers: Sequence[nn.Module] | nn.ModuleList) -> list[int]:
    """Return how many epochs each teacher gets. Raises `SpecError` where one would get none."""
    is_list = isinstance(teachers, Sequence | nn.ModuleList)
    if not is_list or not all(isinstance(teacher, nn.Module) for teacher in teachers):
        raise SpecError("teachers are not a list of modules; give one, the smallest first: teachers=[model]")
    if not teachers:
        raise SpecError("there is no teacher; give one or more, the smallest first: teachers=[model]")
    each, rest = divmod(epochs, len(teachers))
    if each < 1:
        raise SpecError(f"epochs is {epochs}, and {len(teachers)} teachers share them; give each 1 or more")
    return [each + (place >= len(teachers) - rest) for place in range(len(teachers))]


def _is_better(history: History, earlier: Sequence[History]) -> bool:
    """Whether the lowest validation loss is below those of all earlier runs; without validation it is."""
    lowest = [
        run.records[run.best_epoch - 1].measures["loss"] for run in (history, *earlier) if run.best_epoch is not None
    ]
    return lowest[0] < min(lowest[1:]) if lowest else True


@contextmanager
def _rehearsal(module: nn.Module, lessons: Sequence[Distillation]) -> Iterator[None]:
    """Let later teachers answer to the first call of all: one that does not fit fails now, not when its turn comes."""

    def rehearse(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            handle.remove()
            for lesson in lessons:
                with _device_kept(lesson.teacher):
                    lesson.teacher.to(_device(module))
                    lesson.comparison.between(output, lesson.answer(args, kwargs), lesson.title)

    handle = module.register_forward_hook(rehearse, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _device_kept(module: nn.Module) -> Iterator[None]:
    """Give a module its device back."""
    device = _device(module)
    try:
        yield
    finally:
        module.to(device)


def _device(module: nn.Module) -> torch.device:
    """Return where a module is; one without tensors is everywhere, so on the CPU."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _autocast() -> AbstractContextManager[None]:
    """Return the context of the run's mixed precision, the one that Accelerate puts around the module."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import get_mixed_precision_context_manager

    return get_mixed_precision_context_manager(AcceleratorState().mixed_precision != "no")
