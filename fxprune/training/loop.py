"""Train a module: fine-tune what was pruned, or learn what to prune."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from fxprune.errors import InputError, SpecError
from fxprune.training.batches import Feed, feed
from fxprune.training.checkpoints import check_settings, claim_folder, read_checkpoint, write_checkpoint
from fxprune.training.history import History
from fxprune.training.hooks import Hook
from fxprune.training.loan import on_loan
from fxprune.training.log import write_log
from fxprune.training.objectives import Loss, Measure
from fxprune.training.options import Training
from fxprune.training.processes import open_accelerator
from fxprune.training.run import Run
from fxprune.training.validation import Validation

__all__ = ["train"]


def train(
    module: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    options: Training,
    *,
    validation: Iterable[Any] | None = None,
    measure: Measure | None = None,
    hooks: Sequence[Hook] = (),
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> History:
    """Train `module` in place and return what happened, epoch by epoch.

    Each step minimises `loss(module, batch)` and the hooks' penalties. `batches` and `validation` are DataLoaders or
    other iterables that can be run through again. `measure(module, batch)` gives what is averaged over the validation
    data and must have "loss"; by default it is the loss alone. At the end the module has the weights of the best epoch
    if there are validation data (`Training.keep_best`), else the last; its device and modes are as they were, its
    gradients are cleared.

    Under `accelerate launch` or torchrun every process trains on its share: a DataLoader's batch size is that of each
    process, the loss gets the module wrapped for gradients to be exchanged, hooks get the module itself. The seed is
    set on all alike, and the caller's random numbers go on from there.

    `folder` makes the run resumable: it keeps checkpoint.pt, written anew at the start and after every epoch, and the
    log, log.csv and log.json. Called again with the same arguments, a run that was killed goes on from its last
    epoch to what it would have ended with (on a CPU to the bit), and one that has finished returns its history at
    once. On several hosts all must see the folder.

    Raises `UsageError` when the extra `train` is missing; `InputError` for batches that cannot be trained on and when
    a loss is not finite, which leaves the last checkpoint as it is; `SpecError` for hooks or measures that break their
    contract; `ArtifactError` for a folder that is damaged, not writable or of another run.
    """
    _check(hooks, validation, measure)
    accelerator = open_accelerator(options.mixed_precision)
    with on_loan(module, [batches, validation]):
        from accelerate.utils import set_seed

        set_seed(options.seed)
        ours = feed(batches, accelerator, options.seed, even=True)
        checked = None
        if validation is not None:
            shares = feed(validation, accelerator, options.seed, even=False)
            checked = Validation(module, shares, measure or (lambda module, batch: {"loss": loss(module, batch)}))
        length = _length(ours, options, accelerator.num_processes)
        run = Run(module, loss, options, tuple(hooks), ours, length, checked, accelerator)
        _advance(run, Path(folder) if folder is not None else None, progress)
    return run.history


def _check(hooks: Sequence[Hook], validation: object, measure: object) -> None:
    """Raise `SpecError` for arguments that do not go together."""
    for name, count in Counter(hook.name for hook in hooks).items():
        if count > 1:
            raise SpecError(f"{count} hooks have the name '{name}'; give each its own, their states are kept by it")
    if measure is not None and validation is None:
        raise SpecError("there is a measure but nothing to measure on; give validation=… too")


def _length(ours: Feed, options: Training, processes: int) -> int:
    """Return how many steps an epoch has."""
    if ours.length is None and options.steps_per_epoch is None:
        raise InputError("the batches have no length; set Training(steps_per_epoch=…)")
    if ours.length == 0:
        raise InputError(f"there are too few batches: each of the {processes} processes needs one")
    return min(length for length in (ours.length, options.steps_per_epoch) if length is not None)


def _advance(run: Run, folder: Path | None, progress: bool) -> None:
    """Start or resume a run and train until it stops."""
    if folder is None or not _resume(run, folder):
        if run.validation is not None:
            run.validation.check()
        _save(run, folder)
    with _bar(run, progress) as bar:
        while run.history.stopped_by is None:
            run.epoch(bar)
            _save(run, folder)
    run.finish()


def _resume(run: Run, folder: Path) -> bool:
    """Take the run up from its folder; return False where it has not begun."""
    claim_folder(folder)
    state = read_checkpoint(folder)
    run.accelerator.wait_for_everyone()  # so that no process reads what the first has yet to write
    if state is None:
        return False
    check_settings(folder, state["settings"], run.settings())
    run.restore(state)
    if run.accelerator.is_main_process:
        write_log(folder, run.history)
    return True


def _save(run: Run, folder: Path | None) -> None:
    if folder is None:
        return
    state = run.state()
    if run.accelerator.is_main_process:
        write_checkpoint(folder, state)
        write_log(folder, run.history)
    run.accelerator.wait_for_everyone()


def _bar(run: Run, progress: bool) -> tqdm[Any]:
    """Return a bar over all steps that shows the time left: on the first process's terminal only."""
    shown = progress and run.accelerator.is_main_process and sys.stderr.isatty()
    total = run.options.epochs * run.length
    return tqdm(total=total, initial=run.step, disable=not shown, unit="step", file=sys.stderr, dynamic_ncols=True)
