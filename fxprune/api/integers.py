"""From a result in float to one that computes on integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx

from fxprune.api.results import Result
from fxprune.errors import InputError, PlanError, UsageError
from fxprune.graph.passes import Observer, Pass, Pipeline
from fxprune.graph.shapes import propagate_shapes
from fxprune.lowering.choices import Choice
from fxprune.lowering.deciding import decide, quantised_layers
from fxprune.lowering.measuring import OURS, Stopwatch
from fxprune.lowering.rows import lowered_rows
from fxprune.machine import processor
from fxprune.plan import Plan, PlannedLowering, keep_plan
from fxprune.quantization import Ranges, float_layers
from fxprune.runtime.int8 import BlockSparseInt8Linear, Int8Linear
from fxprune.runtime.int8.layer import Int8Layer
from fxprune.runtime.weight_masks import finalize
from passes import BatchnormFolding, BlockSparseInt8Lowering, Conv1x1ToLinear, Quantization

__all__ = ["Floats"]

_BEFORE = (BatchnormFolding(), Conv1x1ToLinear())
"""What is done to a graph before it is quantised."""


@dataclass(frozen=True)
class Floats:
    """A result, and its graph as it is quantised: batch norms folded, 1×1 convolutions linear, masks baked in."""

    before: Result
    graph: fx.GraphModule
    observers: tuple[Observer, ...]

    @staticmethod
    def of(before: Result, observers: tuple[Observer, ...]) -> Floats:
        """Make the graph."""
        if any("val" not in node.meta for node in before.module.graph.nodes):
            propagate_shapes(before.module)
        graph = finalize(Pipeline(_BEFORE, observers)(before.module).graph_module)
        graph.training = False  # torch.export leaves its graphs in training mode, whatever they compute
        return Floats(before, graph, observers)

    def lower(self, quantization: Quantization, step: BlockSparseInt8Lowering) -> Result:
        """Quantise the graph with ranges, and give its layers to the backends that a pass names.

        Raises `InputError` when no layer can be computed on integers.
        """
        result = self._lowered(quantization, step, {})
        assert result.plan.lowering is not None
        if not result.plan.lowering.layers:
            reasons = list(result.plan.lowering.floating.items())
            why = "; ".join(f"'{path}': {reason}" for path, reason in reasons[:3]) or "it has no linear layer"
            raise InputError(f"no layer of the model can be computed on integers: {why}")
        return self._recorded(result, quantization, step)

    def lower_fastest(self, quantization: Quantization, block: str) -> Result:
        """Lower with what is fastest for each layer on this machine; `block` is the form of sparse weights.

        Raises `InputError` when no layer can be computed on integers.
        """
        decision = decide(partial(self._quantised, quantization), self.graph, Stopwatch(block))
        if not decision.times:
            return self.lower(quantization, BlockSparseInt8Lowering())
        quantization = replace(quantization, keep_float=decision.floating)
        step = BlockSparseInt8Lowering(decision.choices, block)
        times = {path: found.choices for path, found in decision.times.items()}
        threads = torch.get_num_threads()
        note = f"layers were measured on {processor()} with {threads} thread{'s' * (threads != 1)}"
        result = self._recorded(self._lowered(quantization, step, times), quantization, step)
        return replace(result, notes=(*result.notes, note))

    def lower_as_planned(self, plan: Plan, planned: PlannedLowering) -> Result:
        """Lower as a plan says. Raises `PlanError` when it is a plan for another model."""
        quantization = Quantization(ranges=planned.ranges, keep_float=planned.floating)
        try:
            found = quantised_layers(self._quantised(quantization, planned.floating))
            if found.keys() != planned.layers.keys():
                path = min(found.keys() ^ planned.layers.keys())
                where = "it" if path in planned.layers else "this model"
                raise PlanError(f"only in {where} is '{path}' computed on integers")
            linear = [path for path, (_, layer) in found.items() if isinstance(layer, Int8Linear)]
            step = BlockSparseInt8Lowering({path: planned.layers[path] for path in linear})
            return self._lowered(quantization, step, {})
        except UsageError as error:
            raise PlanError(f"the plan is for another model: {error}; {plan.remedy}") from error

    def _quantised(self, quantization: Quantization, floating: Mapping[str, str]) -> fx.GraphModule:
        return Pipeline((replace(quantization, keep_float=floating),))(self.graph).graph_module

    def _lowered(
        self, quantization: Quantization, step: BlockSparseInt8Lowering, times: Mapping[str, Mapping[str, float]]
    ) -> Result:
        """Run the two passes; `times` are microseconds by path and candidate."""
        module = Pipeline((quantization, step), self.observers)(self.graph).graph_module
        choices, floating = _choices(module), dict(float_layers(module))
        planned = PlannedLowering(quantization.ranges or Ranges("", {}), choices, floating)
        plan = replace(self.before.plan, lowering=planned)
        keep_plan(module, plan)
        rows = tuple(lowered_rows(module, choices, floating, times))
        return replace(self.before, module=module, plan=plan, masked=self.before.module, lowering=rows)

    def _recorded(self, result: Result, *steps: Pass) -> Result:
        """Let the plan say which passes made the result."""
        spec = ",".join(filter(None, (result.plan.spec, *(step.record() for step in (*_BEFORE, *steps)))))
        plan = replace(result.plan, spec=spec)
        keep_plan(result.module, plan)
        return replace(result, plan=plan)


def _choices(module: fx.GraphModule) -> dict[str, str]:
    """Return path → what computes it of the lowered layers of a graph."""
    layers = {path: part for path, part in module.named_modules() if isinstance(part, Int8Layer)}
    return {path: _runs(layer) for path, layer in layers.items()}


def _runs(layer: Int8Layer) -> str:
    """Say what computes a layer; those without a choice run in our kernels, or by their reference."""
    return str(Choice.of_layer(layer)) if isinstance(layer, BlockSparseInt8Linear) else OURS
