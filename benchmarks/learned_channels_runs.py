"""The runs of `learned_channels`: prune, fine-tune, measure, and say beforehand how long it takes."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

import fxprune
from benchmarks.cases import Case, batches, cifar_case, top1, training_data
from benchmarks.learned_channels_rows import ALONE, Job, Row, spelled
from fxprune.training import History, Training, cross_entropy, distill, train

__all__ = ["DEPTHS", "LOGITS", "Setting", "beginning", "budget", "case_of", "estimate", "learn", "measure"]

DEPTHS = {"resnet20": 20, "resnet56": 56}
LOGITS: dict[str, dict[str, Any]] = {
    "gates": {"logits": "predicted", "gate_rate": 30.0},
    "trained": {"logits": "trained", "gate_rate": 100.0},
}
"""What is particular to a way to learn, by method: a step of a predictor moves a logit further than its own."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What every row of a run shares."""

    source: ModuleType
    work: Path
    limit: int
    batch_size: int
    learn_batch: int
    gates: dict[str, Any]
    tuning: dict[str, Any]
    distillation: dict[str, Any]

    def learning(self, method: str) -> dict[str, Any]:
        """Return how gates learn: options of `Training`, and the others of `learn_channels`."""
        return {**LOGITS[method], **self.gates}

    def all(self, method: str, teachers: str) -> str:
        """Return all that a row depends on, besides its job."""
        gates: dict[str, Any] = {}
        if method in LOGITS:
            gates = {f"gates.{name}": value for name, value in self.learning(method).items()}
            gates["gates.batch_size"] = self.learn_batch
        taught = self.distillation if teachers != ALONE else {}
        return spelled({"limit": self.limit, "batch_size": self.batch_size, **self.tuning, **taught, **gates})


@dataclass(frozen=True)
class Cut:
    """A network before fine-tuning, and what rows say of it."""

    module: nn.Module
    measured: dict[str, Any]


@functools.cache
def case_of(model: str, setting: Setting) -> Case:
    """Return a trained model with its images."""
    return cifar_case(setting.source, DEPTHS[model], setting.limit, 500)


def budget(steps: int, seed: int, longest: int, options: dict[str, Any]) -> Training:
    """Return how to train for just so many steps: in an even number of equal epochs, which two teachers can share.

    Epochs have at most the `longest` steps that the data give.

    Seeds are far apart: the order of samples comes from the sum of seed and epoch.
    """
    least = 2 * -(-steps // (2 * longest))
    epochs = next(count for count in range(least, steps + 1, 2) if steps % count == 0)
    known: dict[str, Any] = {"steps_per_epoch": steps // epochs, "tolerance": None, "keep_best": False}
    return Training(epochs, seed=1000 * seed, **known, **options)


def seconds_of(*histories: History) -> float:
    """Return how long training took, without the pauses of runs that were killed."""
    return sum(record.seconds for history in histories for record in history.records)


def learn(job: Job, setting: Setting, folder: Path | None = None) -> fxprune.Learned:
    """Let gates choose the channels, and train the weights beside them."""
    case, options = case_of(job.model, setting), setting.learning(job.method)
    seen, _ = training_data(setting.source, setting.learn_batch)
    of_training = {field.name for field in fields(Training)}
    training = {name: value for name, value in options.items() if name in of_training}
    return fxprune.learn_channels(
        case.model,
        case.example,
        seen,
        cross_entropy,
        budget(job.learn_steps, job.seed, len(seen), training),
        macs=f"{job.level}%",
        folder=folder,
        **{name: value for name, value in options.items() if name not in of_training},
    )


def prune(job: Job, setting: Setting) -> tuple[fxprune.Result, float]:
    """Remove channels; return the result, and for how many seconds gates learned."""
    if job.method in LOGITS:
        learned = learn(job, setting, setting.work / job.folder)
        return learned.result, seconds_of(learned.history)
    case = case_of(job.model, setting)
    data: dict[str, Any] = {"batches": list(batches(case)), "loss": cross_entropy} if job.method == "taylor" else {}
    return fxprune.prune(case.model, case.example, macs=f"{job.level}%", criterion=job.method, **data), 0.0


@functools.cache
def cut(job: Job, setting: Setting) -> Cut:
    """Prune a network and measure it."""
    case = case_of(job.model, setting)
    if job.method == "dense":
        accuracy = top1(case, case.model)
        whole = {"macs": 1.0, "parameters": 1.0, "before": accuracy, "recalibrated": accuracy}
        return Cut(case.model, {**whole, "learn_seconds": 0.0, "notes": ()})
    result, seconds = prune(job, setting)
    module, report = result.module.eval(), result.report
    again = fxprune.recalibrate_batchnorm(copy.deepcopy(module), (x for x, _ in batches(case)))
    measured = {
        "macs": report.macs[1] / report.macs[0],
        "parameters": report.parameters[1] / report.parameters[0],
        "before": top1(case, module),
        "recalibrated": top1(case, again),
        "learn_seconds": seconds,
        "notes": result.notes,
    }
    return Cut(module, measured)


def beginning(job: Job, setting: Setting) -> Job:
    """Return the part of a job that comes before fine-tuning, alike for all that start with one network."""
    alike = replace(job, teachers=ALONE, tune_steps=0)
    if job.method in LOGITS:
        return replace(alike, settings=setting.all(job.method, ALONE))
    return replace(alike, seed=0, settings="")


def tune(job: Job, module: nn.Module, setting: Setting) -> float:
    """Fine-tune a network in place, under its teachers; return the seconds."""
    seen, _ = training_data(setting.source, setting.batch_size)
    training = budget(job.tune_steps, job.seed, len(seen), setting.tuning)
    folder = setting.work / job.folder
    if not job.taught_by:
        return seconds_of(train(module, seen, cross_entropy, training, folder=folder))
    teachers = [copy.deepcopy(case_of(name, setting).model) for name in job.taught_by]
    return seconds_of(
        *distill(module, seen, cross_entropy, training, teachers=teachers, folder=folder, **setting.distillation)
    )


def measure(job: Job, setting: Setting) -> Row:
    """Measure a network before and after fine-tuning."""
    start = cut(beginning(job, setting), setting)
    module = copy.deepcopy(start.module)
    seconds = tune(job, module, setting)
    tuned = top1(case_of(job.model, setting), module.eval())
    return Row(**asdict(job), **start.measured, tuned=tuned, tune_seconds=seconds)


@dataclass(frozen=True)
class Pace:
    """Seconds that a dense model takes for a step of training, with gates and without, and for an image."""

    step: float
    gated: float
    image: float


def pace(model: str, is_gated: bool, setting: Setting) -> Pace:
    """Time the second of two steps, and a hundred images."""
    case = case_of(model, setting)
    few = replace(case, tested=(case.tested[0][:100], case.tested[1][:100]))
    start = time.perf_counter()
    top1(few, case.model)
    image = (time.perf_counter() - start) / len(few.tested[0])
    seen, _ = training_data(setting.source, setting.batch_size)
    history = train(copy.deepcopy(case.model), seen, cross_entropy, budget(2, 0, len(seen), setting.tuning))
    gated = 0.0
    if is_gated:
        learned = learn(Job(model, 50, "gates", 0, ALONE, 2, 0, ""), setting)
        gated = learned.history.records[-1].seconds
    return Pace(history.records[-1].seconds, gated, image)


def estimate(jobs: Sequence[Job], setting: Setting) -> float:
    """Return about how many seconds jobs take, as if no channel had left."""
    gated = {job.model for job in jobs if job.method in LOGITS}
    names = sorted({name for job in jobs for name in (job.model, *job.taught_by)})
    paces = {name: pace(name, name in gated, setting) for name in names}
    tested = min(setting.limit, 10000)
    total = 0.0
    for job in {beginning(job, setting) for job in jobs}:
        total += job.learn_steps * paces[job.model].gated + 2 * tested * paces[job.model].image
    for job in jobs:
        answers = [setting.batch_size * paces[name].image for name in job.taught_by]
        step = paces[job.model].step + sum(answers) / max(len(answers), 1)
        total += job.tune_steps * step + tested * paces[job.model].image
    return total
