"""Turn a model into a GraphModule that computes the same, with shapes in `node.meta`.

Front ends, in the order that `frontend="auto"` tries them:

1. *symbolic*: `torch.fx` symbolic tracing with torch.nn modules as leaves, so the graph stays readable and trainable.
   A submodule that cannot be traced becomes an opaque leaf, and tracing goes on.
2. *export*: `torch.export` (non-strict), where the model as a whole defeats symbolic tracing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.errors import InputError, TraceError, UsageError
from fxprune.graph.execution import undisturbed
from fxprune.graph.facts import TraceFacts, set_trace_facts, trace_facts
from fxprune.graph.inputs import ExampleInputs, Inputs, check_model, on_meta
from fxprune.graph.modes import merge_modes
from fxprune.graph.shapes import propagate_shapes

__all__ = ["trace", "trace_graph"]

_MAX_OPAQUE = 64


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
    if frontend != "auto" and frontend not in _FRONTENDS:
        raise TraceError(f"unknown front end '{frontend}'; known front ends: auto, {', '.join(_FRONTENDS)}")
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


def _finish(module: fx.GraphModule, reasons: tuple[str, ...]) -> fx.GraphModule:
    facts = trace_facts(module)
    set_trace_facts(module, replace(facts, notes=(*reasons, *facts.notes)))
    return module


class _Tracer(fx.Tracer):
    """Symbolic tracer that knows which call each input binds to and which submodule failed."""

    def __init__(self, inputs: Inputs, opaque: dict[str, str]) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.inputs = inputs
        self.opaque = opaque
        self.failed: tuple[str, str] | None = None
        self.types: set[type[nn.Module]] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque or _reads_training_only(m):
            return True
        if isinstance(m, _LEAF_BASES) and not any(p is not m for p in _modules_with_state(m)):
            return True
        is_leaf = super().is_leaf_module(m, module_qualified_name)
        if not is_leaf:
            self.types.add(type(m))
        return is_leaf

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if self.failed is None:
                self.failed = (self.path_of_module(m), _first_line(error))
            raise

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: ARG002
        concrete_args: Any = None,  # noqa: ARG002
    ) -> tuple[Callable[..., Any], list[Any]]:
        self.types.add(type(self.root))
        given = self.inputs.bind(self.root.forward)
        parameters = inspect.signature(self.root.forward).parameters
        bound = {name: self._placeholder(parameters[name], value) for name, value in given.items()}
        args, kwargs = _call_arguments(parameters, bound)
        return functools.partial(root_fn, self.root, *args, **kwargs), []

    def _placeholder(self, parameter: inspect.Parameter, value: Any) -> Any:
        """Make the placeholder(s) of one argument; containers are rebuilt from proxies, other values are constants."""
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return [self._input(f"{parameter.name}_{i}", v, ()) for i, v in enumerate(value)]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return {k: self._input(k, v, (None,)) for k, v in value.items()}
        optional = parameter.default is not inspect.Parameter.empty
        return self._input(parameter.name, value, (parameter.default,) if optional else ())

    def _input(self, name: str, value: Any, default: tuple[Any, ...]) -> Any:
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            return value
        proxy = self.create_proxy("placeholder", name, default, {})
        proxy.node.meta["val"] = on_meta(value)
        return _unpack(proxy, value)


def _unpack(proxy: Any, value: Any) -> Any:
    """Rebuild the containers of `value` with item accesses of `proxy` as leaves."""
    if isinstance(value, Tensor):
        return proxy
    if isinstance(value, dict):
        return {k: _unpack(proxy[k], v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_unpack(proxy[i], v) for i, v in enumerate(value)])
    return value


def _call_arguments(parameters: Any, bound: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Spread bound arguments into positional and keyword ones as the signature wants them."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, value in bound.items():
        kind = parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            args.extend(value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            kwargs.update(value)
        elif kind is inspect.Parameter.POSITIONAL_ONLY:
            args.append(value)
        else:
            kwargs[name] = value
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL and bound.get(n) for n, p in parameters.items()):
        before = [n for n, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and n in kwargs]
        args = [kwargs.pop(n) for n in before] + args
    return args, kwargs


_LEAF_BASES = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)


def _modules_with_state(m: nn.Module) -> Iterator[nn.Module]:
    return (s for s in m.modules() if s._parameters or s._buffers)


def _reads_training(kind: Any) -> bool:
    """Whether a method of this class, torch.nn's own aside, reads `self.training`."""
    return _code_reads_training(kind)


@functools.cache
def _code_reads_training(kind: Any) -> bool:
    for base in kind.__mro__:
        if base.__module__.startswith("torch."):
            continue
        for attribute in vars(base).values():
            code = getattr(inspect.unwrap(attribute) if callable(attribute) else None, "__code__", None)
            if code is not None and "training" in code.co_names:
                return True
    return False


def _reads_training_only(m: nn.Module) -> bool:
    """Whether `m` is stateless and acts by `self.training` (DropPath): left a leaf, so train() and eval() reach it."""
    return _reads_training(type(m)) and not any(True for _ in _modules_with_state(m))


def _symbolic(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    opaque: dict[str, str] = {}
    while True:
        tracer = _Tracer(inputs, opaque)
        try:
            with undisturbed(model):
                module = fx.GraphModule(model, tracer.trace(model), type(model).__name__)
            break
        except UsageError:
            raise
        except Exception as error:
            path, reason = tracer.failed or ("", _first_line(error))
            if not path or path in opaque or len(opaque) >= _MAX_OPAQUE:
                raise TraceError(reason) from error
            opaque[path] = reason
    notes: tuple[str, ...] = ()
    if any(_reads_training(t) for t in tracer.types):
        merged = _both_modes(model, inputs, opaque, module.graph)
        module = module if merged is None else fx.GraphModule(model, merged, type(model).__name__)
        notes = (_ONE_MODE.format("training" if model.training else "evaluation"),) if merged is None else ()
    _carry_inputs(module, inputs)
    set_trace_facts(module, TraceFacts("symbolic", opaque, notes))
    module.train(model.training)
    _restore_training(module, model)
    return module


_ONE_MODE = (
    "training and evaluation compute differently and could not be joined into one graph: this is the graph of {} mode, "
    "in which the model was given"
)


def _both_modes(model: nn.Module, inputs: Inputs, opaque: dict[str, str], graph: fx.Graph) -> fx.Graph | None:
    """Trace the other mode as well and merge the two, so that train() and eval() act as in the model."""
    with undisturbed(model):
        model.train(not model.training)
        try:
            other = _Tracer(inputs, opaque).trace(model)
        except Exception:
            return None
    return merge_modes(graph, other, training=model.training)


def _restore_training(module: fx.GraphModule, model: nn.Module) -> None:
    """Give every submodule of the graph the mode that it has in the model."""
    modes = dict(model.named_modules())
    for name, part in module.named_modules():
        if name in modes:
            part.training = modes[name].training


def _carry_inputs(module: fx.GraphModule, inputs: Inputs) -> None:
    """Check that every placeholder knows its value; graphs from torch.export get theirs in order."""
    leaves = iter(inputs.tensors())
    for node in module.graph.nodes:
        if node.op == "placeholder" and "val" not in node.meta:
            node.meta["val"] = on_meta(next(leaves))


def _export(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    try:
        # What torch.export writes about a failure is whole graphs; its message is kept.
        with undisturbed(model), contextlib.redirect_stderr(io.StringIO()):
            exported = torch.export.export(model, inputs.args, inputs.kwargs, strict=False)
    except Exception as error:
        raise TraceError(_first_line(error)) from error
    # check_guards adds a submodule of assertions about sizes that surgery is about to change.
    inner = exported.module(check_guards=False)
    module = fx.GraphModule(inner, inner.graph, type(model).__name__)
    for node in module.graph.nodes:
        kept = {"val": on_meta(node.meta["val"])} if node.op == "placeholder" and "val" in node.meta else {}
        node.meta = kept
    set_trace_facts(module, TraceFacts("export"))
    return module


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".strip()


_FRONTENDS: dict[str, Callable[[nn.Module, Inputs], fx.GraphModule]] = {"symbolic": _symbolic, "export": _export}
