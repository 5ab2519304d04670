"""Run passes, replay plans, and keep results in folders."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import fx, nn

from fxprune import artifacts
from fxprune.api.integers import lower_as_planned
from fxprune.api.results import Result, Source, rewrite
from fxprune.errors import InputError
from fxprune.graph.inputs import ExampleInputs, Inputs
from fxprune.graph.passes import Observer, Pass, Pipeline, parse_spec
from fxprune.graph.tracing import trace
from fxprune.graph.undisturbed import undisturbed
from fxprune.plan import Plan, write_weight_masks
from fxprune.runtime.weight_masks import finalize
from passes import PASSES, ChannelSurgery, MaskInsertion, PlanApplication, WeightPlanApplication

__all__ = ["apply_plan", "load", "run_passes", "save"]


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


def apply_plan(
    model: nn.Module, example_inputs: ExampleInputs, plan: Plan, *, observers: Iterable[Observer] = ()
) -> Result:
    """Cut a freshly built model, mask its weights and lower it, as `plan` says.

    What computes a layer is what the plan names, whatever is fastest here.

    Raises `PlanError` when the plan is for another model, `InputError` when a model in training mode is to be lowered.
    """
    if plan.lowering is not None and model.training:
        raise InputError("the model is in training mode, and lowering is for inference; call model.eval() first")
    is_about_channels = bool(plan.orbits) or not (plan.weights or plan.lowering)
    choice = PlanApplication(plan) if is_about_channels else None
    cut: tuple[Pass, ...] = () if choice is None else (MaskInsertion(plan.attention), choice, ChannelSurgery())
    passes = (*cut, WeightPlanApplication(plan)) if plan.weights else cut
    source = Source(model, Inputs.of(example_inputs), plan.frontend, plan.spec, plan.seed)
    watching = tuple(observers)
    result = rewrite(source, passes, choice, watching)
    return result if plan.lowering is None else lower_as_planned(result, plan, plan.lowering, watching)


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
    artifacts.read_weights(folder, finalize(result.module))
    if plan.lowering is None:  # a lowered model has no masks any more, and only evaluates
        write_weight_masks(result.module, plan)
        result.module.train(model.training)
    return result
