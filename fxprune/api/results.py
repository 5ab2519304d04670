"""What every job gives back, and how it is made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version

import torch
from torch import Tensor, fx, nn

from fxprune.graph.dump import diff
from fxprune.graph.facts import trace_facts
from fxprune.graph.inputs import Inputs
from fxprune.graph.passes import Observer, Pass, Pipeline
from fxprune.graph.shapes import copy_shapes, propagate_shapes
from fxprune.graph.tracing import trace_graph
from fxprune.labels.detection import find_orbits
from fxprune.labels.orbits import Orbits
from fxprune.narrowing.kept import kept_classes
from fxprune.plan import Plan, PlannedWeight, keep_plan, plan_of, read_plan, read_weight_masks
from fxprune.report import LoweredLayer, Report
from fxprune.survey import make_report

__all__ = ["Result", "Source", "rewrite"]


@dataclass(frozen=True)
class Result:
    """A model made slimmer or sparser.

    Attributes:
        module: the GraphModule that was made; parameters have the names that they have in the model, where a weight is
            masked those of `torch.nn.utils.parametrize`.
        plan: which channels and weights stayed.
        traced: the graph before; it shares its parameters with the model.
        inputs: the example inputs that it was traced with.
        orbits: what was coupled in the model.
        kept: bool [classes], which classes of channels stayed.
        masked: the graph whose weight masks count, where that is not `module`: in a lowered one they are baked in.
        lowering: what computes the layers of a lowered model.
        notes: what else the report shall say.
        latency_ms: measured medians before and after, where they were measured.
    """

    module: fx.GraphModule
    plan: Plan
    traced: fx.GraphModule
    inputs: Inputs
    orbits: Orbits
    kept: Tensor
    masked: fx.GraphModule | None = None
    lowering: tuple[LoweredLayer, ...] = ()
    notes: tuple[str, ...] = ()
    latency_ms: tuple[float, float] | None = None

    @cached_property
    def report(self) -> Report:
        """What happened to every layer."""
        report = make_report(self.traced, self.orbits, self.kept, self.masked or self.module)
        notes = (*report.notes, *self.notes)
        return replace(report, lowering=self.lowering, notes=notes, latency_ms=self.latency_ms)

    @property
    def changes(self) -> str:
        """Unified diff of the dumps of `traced` and `module`."""
        return diff(self.traced, self.module)


@dataclass(frozen=True)
class Source:
    """A model to work on, the inputs that it is traced with, and what the plan shall say of its making."""

    model: nn.Module
    inputs: Inputs
    frontend: str
    spec: str
    seed: int

    def plan(self, traced: fx.GraphModule, *, chosen: Plan | None, weights: tuple[PlannedWeight, ...]) -> Plan:
        """Return the plan that makes the result from the model as it was before any plan.

        Args:
            traced: the graph of the model.
            chosen: its channels, where this job chose any.
            weights: the masks of the result.
        """
        own = Plan(
            () if chosen is None else chosen.orbits,
            weights,
            type(self.model).__name__,
            trace_facts(traced).frontend,
            self.model.training,
            Plan(()).attention if chosen is None else chosen.attention,
            self.spec,
            self.seed,
            {"fxprune": version("fxprune"), "torch": torch.__version__},
        )
        before = plan_of(self.model)
        if before is None:
            return own
        if before.orbits and own.orbits:
            return replace(own, model=before.model, given=",".join(filter(None, (before.given, before.spec))))
        spec = ",".join(filter(None, (before.spec, own.spec)))
        if own.orbits:
            return replace(own, model=before.model, given=before.given, spec=spec)
        return replace(before, weights=weights, spec=spec, seed=own.seed, versions=own.versions)


def rewrite(
    source: Source,
    passes: Iterable[Pass],
    choice: Pass | None,
    observers: Iterable[Observer],
    start: fx.GraphModule | None = None,
) -> Result:
    """Trace a model and run passes on it.

    Args:
        source: the model.
        passes: to run.
        choice: the one that writes the channel masks, where there is one: the plan's orbits are read from the masked
            graph after it, the plan's weights from the graph at the end.
        observers: called after every pass.
        start: the graph to run them on, where other passes and training came before; by default the traced one.
    """
    traced, watching = trace_graph(source.model, source.inputs, source.frontend), tuple(observers)
    if watching:
        propagate_shapes(traced)  # or the first change that they see would be the shapes
    module, chosen = traced, None
    for step, module, _ in Pipeline(tuple(passes), watching).steps(traced if start is None else start):
        if step is choice:
            orbits = find_orbits(module)
            chosen, kept = read_plan(module, orbits), kept_classes(module, orbits)
            copy_shapes(module, traced)
    if choice is None:
        copy_shapes(module, traced)
        orbits = find_orbits(traced)
        kept = torch.ones(orbits.labelling.partition.count, dtype=torch.bool)
    plan = source.plan(traced, chosen=chosen, weights=read_weight_masks(module))
    keep_plan(module, plan)
    return Result(module, plan, traced, source.inputs, orbits, kept)
