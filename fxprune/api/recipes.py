"""Learn channels, cut and fine-tune, as a recipe says."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fxprune.api.learning import Learned, learn_channels
from fxprune.api.replay import save
from fxprune.api.results import Result
from fxprune.batchnorm import recalibrate_batchnorm
from fxprune.errors import UsageError
from fxprune.gating.trail import GateTrail
from fxprune.insights.widths import LayerWidth, layer_widths, stage_widths
from fxprune.machine import this_machine
from fxprune.plots import check_plot, plot_gates, plot_widths
from fxprune.recipes import folders, reading
from fxprune.recipes.folders import Summary
from fxprune.recipes.task import Task, open_task
from fxprune.training.batches import feed
from fxprune.training.distillation import distill
from fxprune.training.history import History
from fxprune.training.loan import on_loan
from fxprune.training.loop import train
from fxprune.training.objectives import Measure
from fxprune.training.options import Training
from fxprune.training.processes import open_accelerator
from fxprune.training.validation import Validation
from fxprune.zoo import BuiltModel, build_model

if TYPE_CHECKING:
    from fxprune.recipes.schema import Finetune, Job, Recipe

__all__ = ["check_recipe", "is_first_process", "read_recipe", "run_recipe"]


def read_recipe(path: str | os.PathLike[str]) -> reading.RecipeFile:
    """Read and check a recipe; nothing that it names is imported but functions among the options.

    Raises `SpecError` with the first mistake, `UsageError` when the extra `train` is missing.
    """
    return reading.read_recipe(path, learn_channels, distill)


def check_recipe(path: str | os.PathLike[str]) -> Summary:
    """Take one step of everything that a recipe asks for, in a folder that goes away.

    Returns what came of it: the target and what there is before are those of the run itself. Raises as `run_recipe`.
    """
    return _open(read_recipe(path)).rehearsed()


def run_recipe(
    path: str | os.PathLike[str], folder: str | os.PathLike[str], *, tell: Callable[[str], object] = lambda _: None
) -> Summary:
    """Learn which channels matter, cut the others and fine-tune what is left, as a recipe says.

    Before a new run one step of everything is taken on the first batch, so that a mistake anywhere in the recipe shows
    at once. The folder gets recipe.toml (which reproduces the run from there), learn/ and finetune/ (logs and
    checkpoints), model/ (what `fxprune.save` writes), on request widths.png and gates.png, and at the end summary.json.

    Called again with the same recipe, a run that was killed goes on where it was, and one that has finished returns its
    summary. Under `accelerate launch` every process calls it.

    Args:
        path: the recipe, a TOML file.
        folder: a new one, or that of a run to go on with.
        tell: called with the name of every stage.

    Raises:
        SpecError, InputError, TargetError, ArtifactError: a mistake in the recipe, in what it names, or in the folder.
        UsageError: the extra `train` is missing.
    """
    place, file = Path(folder), read_recipe(path)
    folders.check_folder(place, file, read_recipe)
    finished = Summary.read(place)
    if finished is not None:
        return finished
    run = _open(file)
    if not folders.has_begun(place):
        tell("trying every stage on one batch")
        run.rehearsed()
    if is_first_process():
        folders.claim_folder(place, file)
    return replace(run, folder=place).advance(tell)


def is_first_process() -> bool:
    """Whether this process is the one that writes and prints."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


@dataclass(frozen=True)
class _Run:
    """A recipe with all that it names, and the folder where it runs; without one it takes one step of each training."""

    file: Path
    recipe: Recipe
    built: BuiltModel
    teachers: tuple[nn.Module, ...]
    task: Task
    folder: Path | None = None

    def learn(self) -> Learned:
        """Learn which channels matter and cut the others."""
        job = self.recipe.learn
        how = job.arguments(learn_channels) | self._how("learn") | {"frontend": self.recipe.model.frontend}
        with _located(self.file, "learn"):
            return learn_channels(
                self.built.model, self.built.inputs, self.task.batches, self.task.loss, self._options(job), **how
            )

    def finetune(self, module: nn.Module, job: Finetune) -> dict[str, History]:
        """Train what is left, with one teacher after the other where there are any; return what happened by folder."""
        options = self._options(job, shares=max(len(self.teachers), 1))
        given, how = (module, self.task.batches, self.task.loss, options), self._how("finetune")
        with _located(self.file, "finetune"):
            if job.recalibrate:
                _recalibrate(module, self.task.batches, self.recipe.seed)
            if not self.teachers:
                return {"finetune": train(*given, **how)}
            histories = distill(*given, **job.arguments(distill) | how | {"teachers": self.teachers})
        return {f"finetune/teacher-{number}": history for number, history in enumerate(histories, start=1)}

    def means(self, module: nn.Module) -> dict[str, float]:
        """Return what the validation data say of a module; nothing where there are none."""
        loss = self.task.loss
        measure = self.task.measure or (lambda module, batch: {"loss": loss(module, batch)})
        if self.task.validation is None:
            return {}
        with _located(self.file, "task"):
            return _means(module, self.task.validation, measure)

    def rehearsed(self) -> Summary:
        """Run on the first batches, save in a folder that goes away, and return what came of it."""
        with _located(self.file, "data"):
            first = self.task.first(open_accelerator("no").num_processes)
        return replace(self, task=first).advance(lambda _: None)

    def advance(self, tell: Callable[[str], object]) -> Summary:
        """Go on to the end from where the folder is."""
        tell("measuring the model")
        measures = {"before": self.means(self.built.model)}
        tell("learning channels")
        learned = self.learn()
        result = replace(learned.result, notes=(*learned.result.notes, *self.built.notes))
        measures["cut"] = self.means(result.module)
        histories = {"learn": learned.history}
        if self.recipe.finetune is not None:
            tell("fine-tuning")
            histories |= self.finetune(result.module, self.recipe.finetune)
            measures["fine-tuned"] = self.means(result.module)
            result = replace(result, notes=(*result.notes, *_worse(measures["cut"], measures["fine-tuned"])))
        widths = layer_widths(result.traced, result.report)
        summary = Summary(
            target=self.recipe.learn.arguments(learn_channels)["macs"],
            macs=result.report.macs,
            parameters=result.report.parameters,
            stages=stage_widths(widths),
            measures={stage: row for stage, row in measures.items() if row},
            seconds={name: _seconds(history) for name, history in histories.items()},
            versions=this_machine(_VERSIONS).versions,
        )
        if is_first_process():
            tell("writing")
            with _located(self.file, "output"), tempfile.TemporaryDirectory() as aside:
                folder = self.folder or Path(aside)
                self._write(folder, result, learned.trail, widths)
                summary.write(folder)
        return summary

    def _write(self, folder: Path, result: Result, trail: GateTrail, widths: Sequence[LayerWidth]) -> None:
        """Write the model and the pictures; where there is no summary yet, all is written anew."""
        output, model = self.recipe.output, folder / "model"
        shutil.rmtree(model, ignore_errors=True)
        save(result, model, pt2=output.pt2, onnx=output.onnx)
        if output.plots:
            plot_widths(widths, folder / "widths.png")
            plot_gates(trail, folder / "gates.png")

    def _how(self, name: str) -> dict[str, Any]:
        folder = None if self.folder is None else self.folder / name
        return {"validation": self.task.validation, "measure": self.task.measure, "folder": folder}

    def _options(self, job: Job, shares: int = 1) -> Training:
        """Return how to train: without a folder one step for each of those that share the epochs."""
        options = job.training(self.recipe.seed)
        if self.folder is not None:
            return options
        return replace(options, epochs=min(options.epochs, shares), steps_per_epoch=1)


_VERSIONS = ("fxprune", "torch", "torchvision", "accelerate")


def _open(file: reading.RecipeFile) -> _Run:
    """Build the models of a recipe and load its data."""
    recipe = file.recipe
    open_accelerator("no")  # the extra may be missing
    if recipe.output.plots:
        check_plot("widths.png")
    with _located(file.path, "model"):
        built = build_model(recipe.model.source(recipe.model.input, recipe.seed))
    teachers = []
    for place, teacher in enumerate(recipe.finetune.teachers if recipe.finetune is not None else ()):
        with _located(file.path, f"finetune.teachers[{place}]"):
            teachers.append(build_model(teacher.source(recipe.model.input, recipe.seed)).model)
    with _located(file.path, "data"):
        task = open_task(recipe)
    return _Run(file.path, recipe, built, tuple(teachers), task)


@contextmanager
def _located(file: Path, key: str) -> Iterator[None]:
    """Say of mistakes where in which recipe they are."""
    try:
        yield
    except UsageError as error:
        raise type(error)(f"'{file}': {key}: {error}") from error


def _means(module: nn.Module, batches: Iterable[Any], measure: Measure) -> dict[str, float]:
    """Return the means of a measure; the module is given back as it came."""
    accelerator = open_accelerator("no")
    with on_loan(module, [batches]):
        module.to(accelerator.device)
        return Validation(module, feed(batches, accelerator, 0, even=False), measure).means()


def _worse(cut: Mapping[str, float], tuned: Mapping[str, float]) -> Iterator[str]:
    """Say that fine-tuning did harm, where it did."""
    if cut and tuned["loss"] > cut["loss"]:
        yield (
            f"fine-tuning ended worse than it began: the validation loss was {cut['loss']:.4g} after the cut and is "
            f"{tuned['loss']:.4g}; fine-tune for longer, or with a lower learning_rate"
        )


def _recalibrate(module: nn.Module, batches: Iterable[Any], seed: int) -> None:
    """Estimate the statistics of batch norms anew from the inputs, which are the first part of every batch."""
    accelerator = open_accelerator("no")
    with on_loan(module, [batches]):
        module.to(accelerator.device)
        every = feed(batches, accelerator, seed, even=False).epoch(0)
        recalibrate_batchnorm(module, (batch[0] if isinstance(batch, tuple | list) else batch for batch in every))


def _seconds(history: History) -> float:
    return sum(record.seconds for record in history.records)
