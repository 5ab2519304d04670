"""Make weights sparse while the model trains."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fxprune.api.results import Result, Source, rewrite
from fxprune.api.weights import make_step, sparsify
from fxprune.checkpoint import load_checkpoint
from fxprune.errors import PlanError, SpecError, nearest
from fxprune.graph.inputs import ExampleInputs, Inputs
from fxprune.graph.tracing import trace
from fxprune.plan import Plan, PlannedWeight, keep_plan, read_weight_masks
from fxprune.selection import read_patterns
from fxprune.sparsity.layers import choose_layers, find_layers
from fxprune.sparsity.schedules import Schedule
from fxprune.training.gradual import GradualSparsity
from fxprune.training.history import History
from fxprune.training.learned_thresholds import LearnedThresholds, attach_thresholds
from fxprune.training.loop import train
from fxprune.training.objectives import Loss, Measure
from fxprune.training.options import Training
from fxprune.training.traces import Checkpoint, Trace
from passes import WeightPlanApplication

__all__ = ["apply_checkpoint", "learn_thresholds", "sparsify_gradually"]


def sparsify_gradually(
    model: nn.Module,
    example_inputs: ExampleInputs,
    batches: Iterable[Any],
    loss: Loss,
    training: Training,
    *,
    schedule: str | Schedule = "cubic",
    start: float = 0.0,
    end: float = 0.75,
    interval: int = 50,
    validation: Iterable[Any] | None = None,
    measure: Measure | None = None,
    folder: str | os.PathLike[str] | None = None,
    **target: Any,
) -> tuple[Result, History]:
    """Train a copy of a model while more and more of its weights become zero (Zhu & Gupta 2017).

    Args:
        model: any floating-point module; it is not changed.
        example_inputs: as in `sparsify`.
        batches: training data, as in `fxprune.training.train`.
        loss: (module, batch) → scalar, likewise.
        training: how to train. The last weights are kept and all epochs are run, whatever it says of that: earlier
            weights are less sparse.
        schedule: "cubic", "linear", "one-shot", or a function from the part of the way to the part of the amount.
        start: the part of the planned steps at which the masks begin to grow.
        end: that at which they are full; what is left trains with fixed masks.
        interval: steps from one growth to the next.
        validation: data to measure on after every epoch.
        measure: what to measure.
        folder: makes the run resumable.
        target: the target and options of `sparsify`, but for observers.

    Returns the sparse model as `sparsify` does, and the history of the training. Raises what these two raise.
    """
    inputs = Inputs.of(example_inputs)
    frontend = target.pop("frontend", "auto")
    step = make_step(inputs, frontend, **target)
    step.check_target()
    result = sparsify(
        model, inputs, sparsity=0.0, block=step.block, layers=step.named, exclude=step.exclude, frontend=frontend
    )
    hook = GradualSparsity(result.module, step, schedule, start, end, interval)
    options = replace(training, keep_best=False, tolerance=None)
    history = train(
        result.module, batches, loss, options, validation=validation, measure=measure, hooks=[hook], folder=folder
    )
    source = Source(model, inputs, frontend, step.record(), training.seed)
    plan = source.plan(result.traced, chosen=None, weights=read_weight_masks(result.module))
    keep_plan(result.module, plan)
    return replace(result, plan=plan), history


def learn_thresholds(
    model: nn.Module,
    example_inputs: ExampleInputs,
    batches: Iterable[Any],
    loss: Loss,
    training: Training,
    *,
    folder: str | os.PathLike[str],
    validation: Iterable[Any],
    measure: Measure | None = None,
    layers: str | Iterable[str] = ("all",),
    exclude: str | Iterable[str] = (),
    temperature: float = 1e-3,
    exact: bool = False,
    frontend: str = "auto",
    **options: Any,
) -> Trace:
    """Train a copy of a model and a threshold for each of its layers; keep a trace of ever sparser networks (LTP).

    Azarian et al. 2020 (paper 003). `apply_checkpoint` makes a network of the trace a result to fine-tune and save.

    Args:
        model: any floating-point module; it is not changed.
        example_inputs: as in `sparsify`.
        batches: training data, as in `fxprune.training.train`.
        loss: (module, batch) → scalar, likewise.
        training: how to train; all epochs are run unless the target is reached.
        folder: where the trace goes (`folder/trace`), and the state of the training (`folder/training`): called again,
            a run that was killed goes on.
        validation: data that every network of the trace is measured on.
        measure: what to measure; the loss by default.
        layers: which weights get thresholds, as in `sparsify`.
        exclude: which of them not.
        temperature: T₀ of Eq. 15.
        exact: use Eq. 3 instead of Eq. 14 for the weights, which stalls (Fig. 1).
        frontend: "auto", "symbolic" or "export".
        options: of `LearnedThresholds`: regularization (λ), threshold_rate (η_τ/η), ramp, growth, target, interval.

    Raises `SpecError`, `InputError`, `ArtifactError` and what tracing and training raise.
    """
    if training.clip_norm is not None:
        raise SpecError("clip_norm would scale the weights' gradients by those of the thresholds; leave it out")
    graph = trace(model, example_inputs, frontend=frontend)
    chosen = choose_layers(graph, find_layers(graph, {}), read_patterns(layers), read_patterns(exclude))
    trained = copy.deepcopy(model)
    attach_thresholds(trained, [(layer.name, "weight") for layer in chosen], temperature, exact)
    place = Path(folder)
    hook = LearnedThresholds(place / "trace", **options)
    always = replace(training, keep_best=False, tolerance=None)
    train(
        trained,
        batches,
        loss,
        always,
        validation=validation,
        measure=measure,
        hooks=[hook],
        folder=place / "training",
    )
    return Trace.read(place / "trace")


def apply_checkpoint(
    model: nn.Module, example_inputs: ExampleInputs, checkpoint: Checkpoint, *, frontend: str = "auto"
) -> Result:
    """Make a network of a trace a result: its weights, and masks where its thresholds pruned.

    Args:
        model: the architecture that the thresholds were learned on, with any weights; it is not changed.
        example_inputs: as in `sparsify`.
        checkpoint: of a trace, as `trace.at(sparsity=0.8)`.
        frontend: "auto", "symbolic" or "export".

    Raises `InputError` or `PlanError` when the checkpoint is of another model.
    """
    inputs, masks = Inputs.of(example_inputs), checkpoint.masks()
    loaded = copy.deepcopy(model)
    load_checkpoint(loaded, checkpoint.path)
    known = find_layers(trace(loaded, inputs, frontend=frontend), {})
    layers = {name: layer for layer in known for name in layer.parameters}
    for name in masks:
        if name not in layers:
            raise PlanError(f"the checkpoint is of another model: it has a mask for '{name}'; {nearest(name, layers)}")
    weights = tuple(PlannedWeight.of(layers[name], mask) for name, mask in masks.items())
    source = Source(loaded, inputs, frontend, "learned-thresholds", 0)
    return rewrite(source, (WeightPlanApplication(Plan((), weights)),), None, ())
