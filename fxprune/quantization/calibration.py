"""The ranges of a graph's values on the user's batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import InputError, first_line
from fxprune.graph.dump import type_text
from fxprune.graph.execution import ordinary
from fxprune.graph.inputs import Inputs
from fxprune.graph.undisturbed import undisturbed
from fxprune.quantization.observers import EXTREMES, Observed, check_observer
from fxprune.quantization.ranges import Ranges
from fxprune.quantization.values import Values

__all__ = ["calibrate"]


def calibrate(module: fx.GraphModule, batches: Iterable[Any], *, observer: str = "histogram") -> Ranges:
    """Run batches through a float graph and return the ranges of the values that quantisation may need.

    Args:
        module: the graph that is going to be quantised, in evaluation mode; it is not changed.
        batches: model inputs, each as `fxprune.trace` takes them. Of the tuples or lists that a DataLoader gives, what
            the graph has no input for (labels) is left out.
        observer: "histogram" (the range whose quantisation has the least squared error), "percentile" (all but a
            ten-thousandth of the values at either end), or "min-max".

    Raises:
        InputError: there is no batch, one does not fit the graph, or a value is not finite; or the graph is in training
            mode; or torchao is missing.
        SpecError: there is no such observer.
    """
    check_observer(observer)
    if module.training:
        raise InputError("the graph is in training mode; call .eval() on it before it is calibrated")
    watching = _Watching(module, observer)
    count = -1
    with torch.no_grad(), undisturbed(module):
        for count, batch in enumerate(batches):
            watching.batch(count, batch)
    if count < 0:
        raise InputError("no batch was given to calibrate on; give at least one, such as the model will see")
    return Ranges(observer, {name: seen.range for name, seen in watching.seen.items()})


class _Watching(fx.Interpreter):
    """Runs a graph and shows observers the values that they watch."""

    def __init__(self, module: fx.GraphModule, observer: str) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.observer = observer
        self.watched = Values(module).watched
        self.inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        self.seen: dict[str, Observed] = {}
        self.where = ""
        self.current: fx.Node | None = None

    def batch(self, number: int, batch: Any) -> None:
        """Run one batch."""
        self.where = f"batch {number}"
        try:
            inputs = _inputs(batch, self.inputs)
            bound = inputs.bind(self.module.forward)
        except InputError as error:
            raise InputError(f"{self.where} of the calibration: {error}") from error
        if inputs.tensors() and not any(tensor.numel() for tensor in inputs.tensors()):
            raise InputError(f"{self.where} of the calibration holds no values; leave it out")
        if not all(_is_finite(tensor) for tensor in inputs.tensors()):
            raise InputError(f"{self.where} of the calibration holds NaN or infinity; leave such samples out")
        given = [bound.get(str(node.target), *node.args) for node in self.inputs]
        self.current = None
        try:
            self.run(*given)
        except InputError:
            raise
        except Exception as error:
            raise InputError(self._misfit(bound, error)) from error

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and look at its value."""
        self.current = n
        value = super().run_node(n)
        if n.name in self.watched and isinstance(value, Tensor) and value.dtype == torch.float32 and value.numel():
            self._look(n, value)
        return value

    def _look(self, node: fx.Node, value: Tensor) -> None:
        if not _is_finite(value):
            raise InputError(
                f"{self.where} of the calibration makes '{node.target}' (%{node.name}) give NaN or infinity; mend the "
                "model or leave such samples out"
            )
        if node.name not in self.seen:
            self.seen[node.name] = Observed(EXTREMES if self.watched[node.name] else self.observer)
        self.seen[node.name].update(value)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a function with ordinary lists, as generated code does."""
        return super().call_function(target, ordinary(args), ordinary(kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a method with ordinary lists."""
        return super().call_method(target, ordinary(args), ordinary(kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a module with ordinary lists."""
        return super().call_module(target, ordinary(args), ordinary(kwargs))

    def _misfit(self, bound: Mapping[str, Any], error: Exception) -> str:
        """Say what a batch has and what the graph was traced with."""
        given = ", ".join(f"{name} {type_text(value)}" for name, value in bound.items())
        traced = ", ".join(f"{n.target} {type_text(n.meta['val'])}" for n in self.inputs if "val" in n.meta)
        where = "" if self.current is None else f"at '{self.current.target}' (%{self.current.name}): "
        return (
            f"{self.where} of the calibration, {given}, does not run: {where}{first_line(error)}; the graph was traced "
            f"with {traced or 'inputs of unknown shapes'}, of which a batch may change sizes but not channels"
        )


def _inputs(batch: Any, placeholders: list[fx.Node]) -> Inputs:
    """Read a batch; one with more parts than the graph has inputs comes with labels."""
    takes_list = bool(placeholders) and isinstance(placeholders[0].meta.get("val"), list)
    if isinstance(batch, list) and not takes_list:
        batch = tuple(batch)
    return Inputs.of(batch[: len(placeholders)] if isinstance(batch, tuple) else batch)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())
