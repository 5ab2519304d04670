"""The façade: whole jobs in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune import artifacts
from fxprune.graph.dump import diff
from fxprune.graph.facts import trace_facts
from fxprune.graph.inputs import ExampleInputs, Inputs
from fxprune.graph.passes import Observer, Pass, Pipeline, parse_spec
from fxprune.graph.shapes import copy_shapes
from fxprune.graph.tracing import trace, trace_graph
from fxprune.graph.undisturbed import undisturbed
from fxprune.importance import Criterion, Evidence
from fxprune.labels.detection import find_orbits
from fxprune.labels.orbits import Orbits
from fxprune.narrowing.kept import kept_classes
from fxprune.plan import Plan, read_plan
from fxprune.report import Report, make_report
from passes import PASSES, ChannelSelection, ChannelSurgery, MaskInsertion, PlanApplication

__all__ = ["Result", "apply_plan", "load", "prune", "run_passes", "save"]


@dataclass(frozen=True)
class Result:
    """A pruned model.

    Attributes:
        module: the slim GraphModule; parameters have the names that they have in the model.
        plan: which channels stayed.
        traced: the graph before; it shares its parameters with the model.
        inputs: the example inputs that it was traced with.
        orbits: what was coupled in the model.
        kept: bool [classes], which classes of channels stayed.
        notes: what else the report shall say.
        latency_ms: measured medians before and after, where they were measured.
    """

    module: fx.GraphModule
    plan: Plan
    traced: fx.GraphModule
    inputs: Inputs
    orbits: Orbits
    kept: Tensor
    notes: tuple[str, ...] = ()
    latency_ms: tuple[float, float] | None = None

    @cached_property
    def report(self) -> Report:
        """What happened to every layer."""
        report = make_report(self.traced, self.orbits, self.kept)
        return replace(report, notes=(*report.notes, *self.notes), latency_ms=self.latency_ms)

    @property
    def changes(self) -> str:
        """Unified diff of the dumps of `traced` and `module`."""
        return diff(self.traced, self.module)


def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    ratio: float | str | Mapping[str, float] | None = None,
    macs: float | str | None = None,
    parameters: float | str | None = None,
    criterion: str | Criterion = "l2",
    scope: str = "global",
    round_to: int = 1,
    min_width: int = 1,
    max_ratio: float | str = 1.0,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    allow_statistical: bool = False,
    attention: str = "dimensions",
    seed: int = 0,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    frontend: str = "auto",
    observers: Iterable[Observer] = (),
) -> Result:
    """Remove the least important channels of a trained model for good.

    Args:
        model: any floating-point module; it is not changed.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, a dict, or `Inputs`.
        ratio: fraction of channels to remove ("30%", 0.3), or one for each orbit, layer name, glob or type.
        macs: multiply-accumulates to leave: a share ("50%", 0.5) or a count (2e9).
        parameters: parameters to leave, likewise. Exactly one of the three targets is given.
        criterion: "l1", "l2", "fpgm", "bn-scale", "taylor", "random", or a function `Subject` → scores [width].
        scope: "global" ranks all channels together, "uniform" removes the same fraction of every orbit.
        round_to: kept channels of every orbit are a multiple of it.
        min_width: classes that stay in every orbit at least.
        max_ratio: largest fraction that leaves any orbit.
        include: layers whose output channels may leave, by name, glob or type; all by default.
        exclude: layers whose output channels must stay.
        allow_statistical: also cut channels that share statistics (layer norm), where the result is approximate.
        attention: what may leave attention: "dimensions", the same of every head, or "heads", whole heads.
        seed: of the random criterion.
        batches: data for criteria that need it; with `loss`, a function (module, batch) → scalar tensor.
        loss: see `batches`.
        frontend: "auto", "symbolic" or "export".
        observers: called after every pass.

    Raises:
        InputError, TraceError, TargetError, SpecError: a mistake in the call; the model is unchanged.
        VerifyError: a defect of fxprune.
    """
    selection = ChannelSelection(
        ratio=ratio,
        macs=macs,
        parameters=parameters,
        criterion=criterion,
        scope=scope,
        round_to=round_to,
        min_width=min_width,
        max_ratio=max_ratio,
        include=tuple(include),
        exclude=tuple(exclude),
        allow_statistical=allow_statistical,
        seed=seed,
        evidence=None if batches is None or loss is None else Evidence(batches, loss),
    )
    masks = MaskInsertion(attention)
    how = {"spec": _spell(masks, selection), "seed": seed, "frontend": frontend}
    return _cut(model, Inputs.of(example_inputs), masks, selection, how, tuple(observers))


def _spell(masks: MaskInsertion, selection: ChannelSelection) -> str:
    """Spell the pipeline for the record; a function is named, and ratios by layer are said to be such."""
    plain = selection
    if callable(selection.criterion):
        plain = replace(plain, criterion=getattr(selection.criterion, "__name__", "callable"))
    if isinstance(selection.ratio, Mapping):
        plain = replace(plain, ratio="by-layer")
    return str(Pipeline((masks, replace(plain, evidence=None), ChannelSurgery())))


def apply_plan(
    model: nn.Module, example_inputs: ExampleInputs, plan: Plan, *, observers: Iterable[Observer] = ()
) -> Result:
    """Cut a freshly built model as `plan` says.

    Raises `PlanError` when the plan is for another model.
    """
    masks, choice = MaskInsertion(plan.attention), PlanApplication(plan)
    how = {"spec": plan.spec, "seed": plan.seed, "frontend": plan.frontend}
    return _cut(model, Inputs.of(example_inputs), masks, choice, how, tuple(observers))


def _cut(
    model: nn.Module,
    inputs: Inputs,
    masks: MaskInsertion,
    choice: Pass,
    how: dict[str, Any],
    observers: tuple[Observer, ...],
) -> Result:
    """Trace, mask, let `choice` write the masks, and cut; the plan is read from the masked graph between.

    `how` is what the plan shall say of its making: spec, seed and front end.
    """
    traced = trace_graph(model, inputs, how["frontend"])
    how = how | {
        "model": type(model).__name__,
        "frontend": trace_facts(traced).frontend,
        "training": model.training,
        "versions": {"fxprune": version("fxprune"), "torch": torch.__version__},
    }
    slim = traced
    for step, slim, _ in Pipeline((masks, choice, ChannelSurgery()), observers).steps(traced):
        if step is choice:
            orbits = find_orbits(slim)
            plan, kept = read_plan(slim, orbits, **how), kept_classes(slim, orbits)
            copy_shapes(slim, traced)
    return Result(slim, plan, traced, inputs, orbits, kept)


def run_passes(
    model: nn.Module,
    example_inputs: ExampleInputs,
    passes: str | Iterable[Pass],
    *,
    frontend: str = "auto",
    observers: Iterable[Observer] = (),
) -> fx.GraphModule:
    """Trace a model and run passes, given as a spec string or as objects, on it.

    Raises `SpecError` for a spec that does not parse.
    """
    steps = parse_spec(passes, PASSES) if isinstance(passes, str) else tuple(passes)
    traced = trace(model, example_inputs, frontend=frontend)
    return Pipeline(steps, tuple(observers))(traced).graph_module


def save(result: Result, folder: str | os.PathLike[str], *, pt2: bool = False, onnx: bool = False) -> Path:
    """Write a result to a new folder: weights, plan, report, and on request `model.pt2` and `model.onnx`.

    Raises `ArtifactError` when the folder is not empty or cannot be written; nothing is left half-written.
    """
    return artifacts.write_folder(
        folder, result.module, result.plan, result.report, result.changes, result.inputs, pt2=pt2, onnx=onnx
    )


def load(folder: str | os.PathLike[str], model: nn.Module, example_inputs: ExampleInputs | None = None) -> Result:
    """Replay a saved plan on a freshly built model and load the saved weights: equal outputs, bit for bit.

    Args:
        folder: what `save` wrote.
        model: the original architecture, with any weights.
        example_inputs: by default zeros of the saved shapes.

    Raises `ArtifactError` or `PlanError` when something is missing, truncated, newer, or for another model.
    """
    plan = artifacts.read_plan_file(folder)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = artifacts.read_inputs(folder, device) if example_inputs is None else example_inputs
    with undisturbed(model):
        result = apply_plan(model.train(plan.training), given, plan)
    artifacts.read_weights(folder, result.module)
    result.module.train(model.training)
    return result
