"""Turn a model into a GraphModule that computes the same, with shapes in `node.meta`.

Front ends, in the order that `frontend="auto"` tries them:

1. *symbolic*: `torch.fx` symbolic tracing with torch.nn modules as leaves, so the graph stays readable and trainable.
   What cannot be traced becomes an opaque leaf, and tracing goes on (see `symbolic`).
2. *export*: `torch.export` (non-strict), where the model as a whole defeats symbolic tracing.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx, nn

from fxprune.errors import InputError, TraceError, UsageError, first_line
from fxprune.graph.facts import TraceFacts, set_trace_facts, trace_facts
from fxprune.graph.inputs import ExampleInputs, Inputs, check_model, on_meta
from fxprune.graph.shapes import propagate_shapes
from fxprune.graph.symbolic import trace_symbolically
from fxprune.graph.undisturbed import undisturbed

__all__ = ["check_frontend", "trace", "trace_graph"]


def trace(model: nn.Module, example_inputs: ExampleInputs, *, frontend: str = "auto") -> fx.GraphModule:
    """Trace `model` into a GraphModule whose nodes carry shapes in `meta["val"]`.

    Args:
        model: any eager floating-point module; it is not changed. Its parameters are shared with the result.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or `Inputs`. Only shapes,
            dtypes and non-tensor values matter; the latter become constants of the graph.
        frontend: "auto", "symbolic" or "export".

    Raises:
        InputError: the model is quantised, the inputs do not fit it, or are on another device.
        TraceError: no front end succeeded; the message has each one's reason.
    """
    module = trace_graph(model, Inputs.of(example_inputs), frontend)
    propagate_shapes(module)
    return module


def trace_graph(model: nn.Module, inputs: Inputs, frontend: str) -> fx.GraphModule:
    """Trace without shapes, which the first analysis of the graph finds anyway; see `trace`."""
    check_model(model, inputs)
    inputs.bind(model.forward)
    check_frontend(frontend)
    reasons: list[str] = []
    for name in _FRONTENDS if frontend == "auto" else (frontend,):
        try:
            return _finish(_FRONTENDS[name](model, inputs), tuple(reasons))
        except UsageError as error:
            if isinstance(error, InputError):
                raise
            reasons.append(f"the {name} front end could not trace the model: {error}")
    raise TraceError(
        f"{type(model).__name__} could not be traced. " + " | ".join(reasons) + ". Rewrite the named control flow, "
        "or prune the part of the model that does not hold it"
    )


def check_frontend(frontend: str) -> None:
    """Raise `TraceError` for a front end that does not exist."""
    if frontend != "auto" and frontend not in _FRONTENDS:
        raise TraceError(f"unknown front end '{frontend}'; known front ends: auto, {', '.join(_FRONTENDS)}")


def _finish(module: fx.GraphModule, reasons: tuple[str, ...]) -> fx.GraphModule:
    facts = trace_facts(module)
    set_trace_facts(module, replace(facts, notes=(*reasons, *facts.notes)))
    return module


def _export(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    try:
        # What torch.export writes about a failure is whole graphs; its message is kept.
        with undisturbed(model), contextlib.redirect_stderr(io.StringIO()):
            exported = torch.export.export(model, inputs.args, inputs.kwargs, strict=False)
    except Exception as error:
        raise TraceError(first_line(error)) from error
    # check_guards adds a submodule of assertions about sizes that surgery is about to change.
    inner = exported.module(check_guards=False)
    module = fx.GraphModule(inner, inner.graph, type(model).__name__)
    for node in module.graph.nodes:
        kept = {"val": on_meta(node.meta["val"])} if node.op == "placeholder" and "val" in node.meta else {}
        node.meta = kept
    set_trace_facts(module, TraceFacts("export"))
    return module


_FRONTENDS: dict[str, Callable[[nn.Module, Inputs], fx.GraphModule]] = {
    "symbolic": trace_symbolically,
    "export": _export,
}
