"""One run of training: the state that a checkpoint holds, and the epoch that advances it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fxprune.errors import ArtifactError, InputError, SpecError, UsageError, first_line
from fxprune.training.batches import Feed
from fxprune.training.checkpoints import refuse_foreign
from fxprune.training.groups import make_optimizer
from fxprune.training.history import History, Record
from fxprune.training.hooks import Hook, Moment
from fxprune.training.objectives import Loss
from fxprune.training.options import Training
from fxprune.training.processes import gathered, share_buffers
from fxprune.training.randomness import random_state, restore_random_state
from fxprune.training.stopping import best_epoch, has_converged, smoothed
from fxprune.training.validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator
    from tqdm import tqdm

__all__ = ["Run"]


@dataclass
class Run:
    """A module in training. `length` is the number of steps of an epoch."""

    module: nn.Module
    loss: Loss
    options: Training
    hooks: tuple[Hook, ...]
    feed: Feed
    length: int
    validation: Validation | None
    accelerator: Accelerator
    history: History = field(default_factory=History)
    step: int = 0
    best: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        optimizer = make_optimizer(self.module, self.hooks, self.options)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.wrapped, self.optimizer = self.accelerator.prepare(self.module, optimizer)

    def settings(self) -> dict[str, Any]:
        """Return what must be the same when the run is resumed."""
        return {
            **self.options.to_dict(),
            "hooks": [hook.name for hook in self.hooks],
            **{f"{name} of {hook.name}": value for hook in self.hooks for name, value in hook.settings().items()},
            "steps of an epoch": self.length,
            "processes": self.accelerator.num_processes,
            "validation": self.validation is not None,
        }

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on. All processes must call it."""
        states = {hook.name: hook.state_dict() for hook in self.hooks}
        for name, state in states.items():
            refuse_foreign(f"hook '{name}'", state)
        scaler = self.accelerator.scaler
        return {
            "settings": self.settings(),
            "history": self.history.to_dict(),
            "module": self.module.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "hooks": states,
            "random": gathered(random_state(self.feed.device, self.feed.generators)),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned. Raises `ArtifactError` when it is another module's."""
        try:
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(
                f"the run in the folder trains another module ({first_line(error)}); give that one, or another folder"
            ) from error
        for hook in self.hooks:
            hook.load_state_dict(state["hooks"][hook.name])
        self.history = History.from_dict(state["history"])
        self.step = self.history.records[-1].step if self.history.records else 0
        self.best = state["best"]
        own = state["random"][self.accelerator.process_index]
        restore_random_state(own, self.feed.device, self.feed.generators)

    def finish(self) -> None:
        """Put the best weights into the module, where they were kept."""
        if self.best is not None:
            self.module.load_state_dict(self.best)

    def epoch(self, bar: tqdm[Any]) -> None:
        """Train one epoch, validate, and decide whether it was the last."""
        start = time.perf_counter()
        number = len(self.history.records) + 1
        bar.set_description(f"epoch {number}/{self.options.epochs}", refresh=False)
        train_loss, penalty = self._train(number, bar)
        measures = self._measures(number)
        moment = self._moment(number)
        record = Record(
            epoch=number,
            step=self.step,
            learning_rate=self.options.learning_rate * self.options.factor((self.step - 1) / moment.steps),
            train_loss=train_loss,
            penalty=penalty,
            measures=measures,
            smoothed_loss=self._smoothed(measures),
            extras={},
            seconds=0.0,
        )
        record = replace(record, extras=self._extras(moment, record), seconds=time.perf_counter() - start)
        self._append(record)
        self.history = replace(self.history, stopped_by=self._stopped_by(moment, record))

    def _train(self, number: int, bar: tqdm[Any]) -> tuple[float, float]:
        """Take the steps of an epoch; return the means of loss and penalty over them and over all processes."""
        self.wrapped.train()
        for hook in self.hooks:
            hook.before_epoch(self.module, self._moment(number))
        losses = []
        for batch in islice(self.feed.epoch(number), self.length):
            losses.append(self._step(batch, number))
            bar.set_postfix(loss=f"{losses[-1][0]:.4g}", refresh=False)
            bar.update()
        if not losses:
            raise InputError("the batches gave nothing in this epoch; give a DataLoader or a list with at least one")
        share_buffers(self.module)
        everywhere = [pair for part in gathered(losses) for pair in part]
        return _mean([loss for loss, _ in everywhere]), _mean([penalty for _, penalty in everywhere])

    def _step(self, batch: Any, epoch: int) -> tuple[float, float]:
        """Take an optimizer step; return its loss and penalty."""
        moment = self._moment(epoch)
        loss = self.loss(self.wrapped, batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            shown = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise InputError(f"the loss returned {shown}; return a scalar tensor, such as the mean over the batch")
        value = self._finite(loss, "loss", moment)
        total, penalty = loss, 0.0
        for hook in self.hooks:
            more = hook.penalty(self.module, moment)
            if more is not None:
                penalty += self._finite(more, f"penalty of hook '{hook.name}'", moment)
                total = total + more
        self._descend(total, moment)
        self.step += 1
        for hook in self.hooks:
            hook.after_step(self.module, self._moment(epoch))
        return value, penalty

    def _descend(self, total: Tensor, moment: Moment) -> None:
        self.optimizer.zero_grad()
        self.accelerator.backward(total)
        if self.options.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.options.clip_norm)
        factor = self.options.factor(moment.fraction)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()

    def _finite(self, value: Tensor, subject: str, moment: Moment) -> float:
        number = float(value.detach())
        if not math.isfinite(number):
            raise InputError(
                f"the {subject} is {number} at step {moment.step + 1} of {moment.steps} (epoch {moment.epoch}); lower "
                "learning_rate, set clip_norm, or look for such values in the data"
            )
        return number

    def _measures(self, number: int) -> dict[str, float]:
        """Validate; return nothing where there are no validation data."""
        if self.validation is None:
            return {}
        means = self.validation.means()
        if not math.isfinite(means["loss"]):
            raise InputError(
                f"the validation loss is {means['loss']} after epoch {number}; lower learning_rate, set clip_norm, or "
                "look for such values in the data"
            )
        return means

    def _smoothed(self, measures: Mapping[str, float]) -> float | None:
        if not measures:
            return None
        return smoothed(self.history.records, measures["loss"], self.options.smoothing)

    def _append(self, record: Record) -> None:
        """Add the epoch to the history, and keep its weights if they are the best."""
        records = (*self.history.records, record)
        self.history = replace(self.history, records=records, best_epoch=best_epoch(records))
        if self.options.keep_best and self.history.best_epoch == record.epoch:
            self.best = {name: _kept(value) for name, value in self.module.state_dict().items()}

    def _extras(self, moment: Moment, record: Record) -> dict[str, float]:
        """Return what the hooks add to the row; no two may use one name."""
        taken = set(record.row())
        extras: dict[str, float] = {}
        for hook in self.hooks:
            for name, value in hook.columns(self.module, moment).items():
                if name in taken:
                    raise SpecError(f"hook '{hook.name}' adds a column '{name}', which the log has; rename it")
                taken.add(name)
                extras[name] = float(value)
        return extras

    def _stopped_by(self, moment: Moment, record: Record) -> str | None:
        """Ask every hook, the stop rule and the plan, in this order; one process that wants to stop stops all."""
        wishes = [hook.name for hook in self.hooks if hook.after_epoch(self.module, moment, record)]
        wishes = [name for part in gathered(wishes) for name in part]
        if wishes:
            return wishes[0]
        if has_converged(self.history.records, self.options.tolerance):
            return "tolerance"
        return "epochs" if record.epoch == self.options.epochs else None

    def _moment(self, epoch: int) -> Moment:
        return Moment(epoch, self.step, self.options.epochs * self.length, self._measure_now)

    def _measure_now(self) -> Mapping[str, float]:
        if self.validation is None:
            raise UsageError("a hook measures the module, but there are no validation data; give validation=…")
        return self.validation.means()


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _kept(value: Any) -> Any:
    """Return a copy that later steps do not change, tensors on the CPU."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
