"""Symbolic tracing: torch.nn modules as leaves, so the graph stays readable and trainable.

1. Control flow that depends on sizes follows those of the example inputs (see `values`).
2. What cannot be traced becomes an opaque leaf, and tracing goes on (see `opaque`).
3. Attention modules of torch.nn are recorded as explicit operators (see `expansions`).
4. Functions that a library marked with `torch.fx.wrap` are traced into as any other.
5. The graphs of training and of evaluation are merged into one (see `modes`).
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.fx.graph_module import _assign_attr
from torch.utils import _pytree as pytree

from fxprune.errors import DataDependentError, TraceError, UsageError, first_line
from fxprune.graph.einops import teach_einops
from fxprune.graph.expansions import expansion_of
from fxprune.graph.facts import TraceFacts, set_trace_facts
from fxprune.graph.inputs import Inputs
from fxprune.graph.modes import merge_modes, modules_with_state, reads_training, reads_training_only
from fxprune.graph.opaque import Opaque, OpaqueCallable
from fxprune.graph.placeholders import make_placeholders
from fxprune.graph.undisturbed import undisturbed, without_fast_path
from fxprune.graph.values import ValueProxy, Values
from fxprune.runtime.opaque import OpaqueFunction

__all__ = ["trace_symbolically"]

_MAX_OPAQUE = 64


_NAMING = ("call_module", "get_attr")


class _RetryError(Exception):
    """What is opaque has changed; the model is to be traced again."""


class _Tracer(fx.Tracer):
    """Symbolic tracer that knows the values of what it records, which inputs bind where, and what is opaque."""

    def __init__(self, inputs: Inputs, opaque: Opaque, leaves: dict[str, OpaqueFunction] | None = None) -> None:
        super().__init__()
        self.inputs = inputs
        self.opaque = opaque
        self.leaves = {} if leaves is None else leaves
        self.named: dict[str, Any] = {}
        self.reads_training = False

    @functools.cached_property
    def values(self) -> Values:
        """The values of the nodes that were recorded, found when control flow asks."""
        return Values(self.root, self.graph, self.leaves)

    @functools.cached_property
    def names(self) -> dict[int, str]:
        """Id of every parameter and buffer → its first name."""
        tensors = (*self.root.named_buffers(), *self.root.named_parameters())
        return {id(tensor): name for name, tensor in tensors}

    def record(self, model: nn.Module) -> fx.Graph:
        """Trace a model that stays as it is; `named` is then everything that the graph names."""
        teach_einops()
        with without_fast_path(), undisturbed(model), _factories_recorded(), self.opaque.instead(self._call_opaque):
            graph = self.trace(model)
            self.named = {str(n.target): self._find(str(n.target)) for n in graph.nodes if n.op in _NAMING}
        for node in graph.nodes:
            node.meta.pop("is_wrapped", None)  # The generated code would mark these functions as leaves for everybody.
        return graph

    def _find(self, target: str) -> Any:
        return self.leaves[target] if target in self.leaves else operator.attrgetter(target)(self.root)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy that knows its value."""
        return ValueProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of `m` is one node of the graph."""
        if module_qualified_name in self.opaque.modules or reads_training_only(m):
            return True
        if expansion_of(m) is not None:
            self.reads_training |= bool(m.dropout)
            return False
        has_inner_state = any(p is not m for p in modules_with_state(m))
        if isinstance(m, _LEAF_BASES) and not has_inner_state:
            return True
        is_leaf = super().is_leaf_module(m, module_qualified_name) and not isinstance(m, _TRANSPARENT)
        if not is_leaf:
            self.reads_training |= reads_training(m)
        return is_leaf

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a leaf or trace into a module; one that has an expansion is recorded as that."""
        if self.values.running:
            return forward(*args, **kwargs)
        expansion = None if self.path_of_module(m) in self.opaque.modules else expansion_of(m)
        return super().call_module(m, functools.partial(expansion, m) if expansion else forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:  # noqa: ARG002
        """Return a proxy for a parameter or buffer, one for all its uses."""
        name = None if self.values.running else self.names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def _call_opaque(self, known: OpaqueCallable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the call of an opaque function as a leaf beside the module that calls it.

        One that does not work without its module's parameters is refused.
        """
        if self.values.running or not _holds_proxy((args, kwargs)):
            return known.function(*args, **kwargs)
        owner, args = (args[:1], args[1:]) if known.is_method else ((), args)
        try:
            if any(_holds_proxy(vars(o)) for o in owner if hasattr(o, "__dict__")):
                raise NotImplementedError(f"{known.function.__name__} reads what the forward left in its object")
            called = self.create_proxy("call_module", self._leaf_of(known.function, owner), args, kwargs)
            self.values.of(called.node)
        except (DataDependentError, NotImplementedError) as error:
            self.opaque.refuse(known.function.__code__)
            raise _RetryError from error
        return called

    def _leaf_of(self, function: FunctionType, owner: tuple[Any, ...]) -> str:
        """Return the name of the leaf that calls a function, made beside the module that runs where there is none."""
        home = self.root.get_submodule(self.scope.module_path)
        taken = {*vars(home), *home._modules, *home._parameters, *home._buffers}
        for suffix in itertools.chain([""], (f"_{i}" for i in itertools.count(1))):
            attribute = f"{function.__name__}{suffix}"
            name = f"{self.scope.module_path}.{attribute}".lstrip(".")
            if name in self.leaves and self.leaves[name].stands_for(function, *owner):
                return name
            if name not in self.leaves and attribute not in taken and not hasattr(fx.GraphModule, attribute):
                break
        leaf = self.leaves[name] = OpaqueFunction(function, *owner)
        leaf.training = next((o.training for o in owner if isinstance(o, nn.Module)), home.training)
        return name

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: ARG002
        concrete_args: Any = None,  # noqa: ARG002
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Bind placeholders to the model's forward as the example inputs are."""
        self.reads_training |= reads_training(self.root)
        args, kwargs = make_placeholders(self, self.root.forward, self.inputs)
        return functools.partial(root_fn, self.root, *args, **kwargs), []


def _holds_proxy(value: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(value))


_LEAF_BASES = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)


_TRANSPARENT = (
    *(nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer),
    *(nn.TransformerDecoder, nn.TransformerDecoderLayer),
)
"""Modules of torch.nn that are no leaves: what they hold is worth seeing."""

_FACTORIES = (
    *("arange", "empty", "eye", "full", "linspace", "logspace", "meshgrid", "ones", "rand", "randint", "randn"),
    *("randperm", "tensor", "as_tensor", "zeros"),
)
"""Functions that make tensors from numbers: recorded when a number is known only to the graph."""


@contextmanager
def _factories_recorded() -> Iterator[None]:
    """Record factory functions, and trace into functions that a library marked as leaves with `torch.fx.wrap`."""
    wrapped = _symbolic_trace._wrapped_fns_to_patch
    before = dict(wrapped)
    wrapped.clear()
    wrapped.update({(id(vars(torch)), name): vars(torch) for name in _FACTORIES})
    try:
        yield
    finally:
        wrapped.clear()
        wrapped.update(before)


def trace_symbolically(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """Trace a model, leaving opaque what defeats tracing.

    Raises `TraceError` when the model as a whole does.
    """
    opaque = Opaque()
    tracer, graph = _trace_around(model, inputs, opaque)
    notes = [_SIZES] if tracer.values.steered else []
    named = tracer.named
    if tracer.reads_training:
        graph, named, obstacle = _both_modes(model, tracer, graph)
        if obstacle:
            notes.append(_ONE_MODE.format("training" if model.training else "evaluation", obstacle))
    graph._tracer_cls = None  # ours needs more than its class to be made; a graph that is unpickled asks for no more
    module = fx.GraphModule(_holding(named, graph), graph, type(model).__name__)
    functions = {name: leaf for name, leaf in named.items() if name in tracer.leaves}
    reasons = {name: opaque.reasons[leaf.function.__code__] for name, leaf in functions.items()}
    set_trace_facts(module, TraceFacts("symbolic", opaque.modules | reasons, tuple(notes)))
    _assign_modes(module, model)
    return module


def _holding(named: dict[str, Any], graph: fx.Graph) -> nn.Module:
    """Return a module that holds what a graph names, in the order of the graph."""
    root = nn.Module()
    for node in graph.nodes:
        if node.op in _NAMING:
            _assign_attr(named[str(node.target)], root, str(node.target))
    return root


def _trace_around(model: nn.Module, inputs: Inputs, opaque: Opaque) -> tuple[_Tracer, fx.Graph]:
    """Trace again and again, each time around one more opaque callable."""
    for _ in range(_MAX_OPAQUE):
        tracer = _Tracer(inputs, opaque)
        try:
            return tracer, tracer.record(model)
        except UsageError:
            raise
        except _RetryError:
            continue
        except Exception as error:
            if not opaque.add_culprit(error, model):
                raise TraceError(first_line(error)) from error
    raise TraceError(f"more than {_MAX_OPAQUE} of its parts cannot be traced")


_SIZES = "control flow that depends on sizes was followed for the sizes of the example inputs"

_ONE_MODE = (
    "training and evaluation compute differently and could not be joined into one graph: this is the graph of {} mode, "
    "in which the model was given ({})"
)


def _both_modes(model: nn.Module, tracer: _Tracer, graph: fx.Graph) -> tuple[fx.Graph, dict[str, Any], str]:
    """Trace the other mode as well and merge the two, so that train() and eval() act as in the model.

    Return the graph, what it names, and why it is still that of one mode, if it is.
    """
    other = _Tracer(tracer.inputs, tracer.opaque, tracer.leaves)
    with undisturbed(model):
        model.train(not model.training)
        try:
            found = other.record(model)
        except Exception as error:
            return graph, tracer.named, f"the other mode cannot be traced: {first_line(error)}"
        # What only the training graph computes has to run on the example inputs too (an auxiliary head may not).
        if len(found.nodes) != len(graph.nodes) and not (other if model.training else tracer).values.all_known():
            return graph, tracer.named, "training does not run on the example inputs"
    named = tracer.named | other.named | {"training": model.training}
    merged = merge_modes(graph, found, named, training=model.training)
    if merged is None:
        return graph, tracer.named, "evaluation is no part of training, or training writes into what evaluation reads"
    return merged, named, ""


def _assign_modes(module: fx.GraphModule, model: nn.Module) -> None:
    """Give every submodule of the graph the mode that it has in the model; leaves are the model's own."""
    modes = {name: part.training for name, part in model.named_modules()}
    for name, part in module.named_modules():
        part.training = modes.get(name, model.training)
