"""From a result in float to one that computes on integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx

from fxprune.api.results import Result
from fxprune.errors import InputError, PlanError, UsageError
from fxprune.graph.facts import trace_facts
from fxprune.graph.passes import Observer, Pass, Pipeline
from fxprune.graph.shapes import propagate_shapes
from fxprune.lowering.choices import Choice
from fxprune.lowering.deciding import decide, quantised_layers
from fxprune.lowering.measuring import OURS, Stopwatch
from fxprune.lowering.rows import lowered_rows
from fxprune.machine import processor
from fxprune.plan import Plan, PlannedLowering, keep_plan
from fxprune.quantization import Ranges, float_layers
from fxprune.runtime.im2col import im2col
from fxprune.runtime.int8 import BlockSparseInt8Linear, Int8Linear
from fxprune.runtime.int8.layer import Int8Layer
from fxprune.runtime.weight_masks import finalize
from passes import BatchnormFolding, BlockSparseInt8Lowering, Conv1x1ToLinear, DeadCodeElimination, Quantization

__all__ = ["Floats", "lower_as_planned"]


_FOLDING = (BatchnormFolding(), DeadCodeElimination(identities=True))
"""What leaves no trace in what a graph computes, and comes first."""


@dataclass(frozen=True)
class Floats:
    """A result, and its graph as it is quantised.

    Attributes:
        before: the result.
        folded: its graph with batch norms folded and masks baked in.
        graph: the same with linear layers for 1×1 convolutions, and for larger ones that `step` names.
        step: the pass that made them.
        observers: called after every pass.
    """

    before: Result
    folded: fx.GraphModule
    graph: fx.GraphModule
    step: Conv1x1ToLinear
    observers: tuple[Observer, ...]

    @staticmethod
    def of(before: Result, observers: tuple[Observer, ...], im2col: tuple[str, ...]) -> Floats:
        """Make the graphs; `im2col` are names, globs or types of larger convolutions that become linear layers too.

        Raises `SpecError` for one that matches nothing.
        """
        if any("val" not in node.meta for node in before.module.graph.nodes):
            propagate_shapes(before.module)
        folded = finalize(Pipeline(_FOLDING, observers)(before.module).graph_module)
        folded.training = False  # torch.export leaves its graphs in training mode, whatever they compute
        step = Conv1x1ToLinear(im2col)
        return Floats(before, folded, Pipeline((step,), observers)(folded).graph_module, step, observers)

    @cached_property
    def on_patches(self) -> set[str]:
        """The paths of the layers that are convolutions in the folded graph, and linear layers on patches here."""
        return _on_patches(self.graph) - _on_patches(self.folded)

    def lower(self, quantization: Quantization, step: BlockSparseInt8Lowering) -> Result:
        """Quantise the graph with ranges, and give its layers to the backends that a pass names.

        Raises `InputError` when no layer can be computed on integers.
        """
        result = self._lowered(quantization, step, {})
        assert result.plan.lowering is not None
        if not result.plan.lowering.layers:
            reasons = list(result.plan.lowering.floating.items())
            why = "; ".join(f"'{path}': {reason}" for path, reason in reasons[:3]) or _nothing(self.graph)
            raise InputError(f"no layer of the model can be computed on integers: {why}")
        return self._recorded(result, quantization, step)

    def lower_fastest(self, quantization: Quantization, block: str) -> Result:
        """Lower with what is fastest for each layer on this machine; `block` is the form of sparse weights.

        Raises `InputError` when no layer can be computed on integers.
        """

        def quantise(floating: Mapping[str, str]) -> fx.GraphModule:
            return self._quantised(replace(quantization, keep_float=floating))[1]

        decision = decide(quantise, self._without(self.on_patches), Stopwatch(block))
        if not decision.times:
            return self.lower(quantization, BlockSparseInt8Lowering())
        quantization = replace(quantization, keep_float=decision.floating)
        step = BlockSparseInt8Lowering(decision.choices, block)
        times = {path: found.choices for path, found in decision.times.items()}
        threads = torch.get_num_threads()
        note = f"layers were measured on {processor()} with {threads} thread{'s' * (threads != 1)}"
        result = self._recorded(self._lowered(quantization, step, times), quantization, step)
        return replace(result, notes=(*result.notes, note))

    def lower_exactly(self, planned: PlannedLowering) -> Result:
        """Lower as a plan says. Raises `UsageError` when it is a plan for another model."""
        quantization = Quantization(ranges=planned.ranges, keep_float=planned.floating)
        graph = self._quantised(quantization)[1]
        found = quantised_layers(graph)
        if found.keys() != planned.layers.keys():
            path = min(found.keys() ^ planned.layers.keys())
            where = "it" if path in planned.layers else "this model"
            reason = dict(float_layers(graph)).get(path)
            raise PlanError(f"only in {where} is '{path}' computed on integers{f' ({reason})' if reason else ''}")
        linear = [path for path, (_, layer) in found.items() if isinstance(layer, Int8Linear)]
        for path in found.keys() - set(linear):
            if planned.layers[path] != OURS:
                raise PlanError(f"only '{OURS}' computes '{path}', and it has '{planned.layers[path]}'")
        return self._lowered(quantization, BlockSparseInt8Lowering({path: planned.layers[path] for path in linear}), {})

    def _without(self, floating: Iterable[str]) -> fx.GraphModule:
        """Return the graph with convolutions for those linear layers on patches that stay in float."""
        left = self.on_patches.difference(floating)
        if left == self.on_patches:
            return self.graph
        return Pipeline((Conv1x1ToLinear(tuple(sorted(left))),))(self.folded).graph_module

    def _quantised(self, quantization: Quantization) -> tuple[Quantization, fx.GraphModule]:
        """Quantise the graph; return with it the pass, which names all layers on patches that cannot be quantised.

        Those are convolutions: patches in float only cost time.
        """
        while True:
            graph = Pipeline((quantization,))(self._without(quantization.keep_float)).graph_module
            left = {path: reason for path, reason in float_layers(graph) if path in self.on_patches}
            if left.keys() <= quantization.keep_float.keys():
                return quantization, graph
            quantization = replace(quantization, keep_float={**left, **quantization.keep_float})

    def _lowered(
        self, quantization: Quantization, step: BlockSparseInt8Lowering, times: Mapping[str, Mapping[str, float]]
    ) -> Result:
        """Run the two passes; `times` are microseconds by path and candidate."""
        if self.on_patches:
            quantization, _ = self._quantised(quantization)
        given = self._without(quantization.keep_float)
        module = Pipeline((quantization, step), self.observers)(given).graph_module
        choices, floating = _choices(module), dict(float_layers(module))
        on_patches = tuple(path for path in choices if path in self.on_patches)
        planned = PlannedLowering(quantization.ranges or Ranges("", {}), choices, floating, on_patches)
        plan = replace(self.before.plan, lowering=planned)
        keep_plan(module, plan)
        rows = tuple(lowered_rows(module, choices, floating, times))
        return replace(self.before, module=module, plan=plan, masked=self.before.module, lowering=rows)

    def _recorded(self, result: Result, *steps: Pass) -> Result:
        """Let the plan say which passes made the result."""
        made = (*_FOLDING, self.step, *steps)
        spec = ",".join(filter(None, (result.plan.spec, *(step.record() for step in made))))
        plan = replace(result.plan, spec=spec)
        keep_plan(result.module, plan)
        return replace(result, plan=plan)


def lower_as_planned(before: Result, plan: Plan, planned: PlannedLowering, observers: tuple[Observer, ...]) -> Result:
    """Lower a result as its plan says. Raises `PlanError` when it is a plan for another model."""
    try:
        return Floats.of(before, observers, planned.im2col).lower_exactly(planned)
    except UsageError as error:
        raise PlanError(f"the plan is for another model: {error}; {plan.remedy}") from error


def _nothing(graph: fx.GraphModule) -> str:
    """Say why a graph has no layer that could be computed on integers."""
    frontend = trace_facts(graph).frontend
    remedy = ", whose modules are operators now; give frontend='symbolic'" if frontend == "export" else ""
    return f"its graph calls no linear layer or convolution of torch.nn (front end '{frontend}'{remedy})"


def _on_patches(graph: fx.GraphModule) -> set[str]:
    """Return the paths of the layers that a graph calls on patches."""
    readers = [user for node in graph.graph.nodes if node.target is im2col for user in node.users]
    return {str(reader.target) for reader in readers if reader.op == "call_module"}


def _choices(module: fx.GraphModule) -> dict[str, str]:
    """Return path → what computes it of the lowered layers of a graph."""
    layers = {path: part for path, part in module.named_modules() if isinstance(part, Int8Layer)}
    return {path: _runs(layer) for path, layer in layers.items()}


def _runs(layer: Int8Layer) -> str:
    """Say what computes a layer; those without a choice run in our kernels, or by their reference."""
    return str(Choice.of_layer(layer)) if isinstance(layer, BlockSparseInt8Linear) else OURS
