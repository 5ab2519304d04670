"""Placeholders of a graph: one for every argument that holds tensors, bound as the model's forward takes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.graph.inputs import Inputs, on_meta

__all__ = ["make_placeholders"]


def make_placeholders(
    tracer: fx.Tracer, forward: Callable[..., Any], inputs: Inputs
) -> tuple[list[Any], dict[str, Any]]:
    """Return positional and keyword arguments of `forward`, with proxies of placeholders for tensors.

    Containers are rebuilt from proxies; values without tensors are constants of the graph.
    """
    parameters = inspect.signature(forward).parameters
    bound = {name: _bind(tracer, parameters[name], value) for name, value in inputs.bind(forward).items()}
    return _call_arguments(parameters, bound)


def _bind(tracer: fx.Tracer, parameter: inspect.Parameter, value: Any) -> Any:
    """Make the placeholder, or placeholders, of one argument."""
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return [_placeholder(tracer, f"{parameter.name}_{i}", v, ()) for i, v in enumerate(value)]
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return {k: _placeholder(tracer, k, v, (None,)) for k, v in value.items()}
    optional = parameter.default is not inspect.Parameter.empty
    return _placeholder(tracer, parameter.name, value, (parameter.default,) if optional else ())


def _placeholder(tracer: fx.Tracer, name: str, value: Any, default: tuple[Any, ...]) -> Any:
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
        return value
    proxy = tracer.create_proxy("placeholder", name, default, {})
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
