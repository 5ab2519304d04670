"""The kinds of layers that compute on uint8: one table; what each must be, and why other layers cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from fxprune.errors import InputError
from fxprune.graph.hooks import is_hooked
from fxprune.quantization import building
from fxprune.quantization.building import Numbers
from fxprune.runtime.int8.layer import MOST_FEATURES, Int8Layer
from fxprune.runtime.weight_masks import WeightMask, class_of, is_plain, kind_of, parametrized
from fxprune.runtime.windows import pads_evenly

__all__ = ["DEPTHWISE", "KINDS", "Kind", "check_finalized", "find_kind", "refusal", "runs_as", "without_kind"]


@dataclass(frozen=True)
class Kind:
    """Float layers that compute on uint8 in one way.

    Attributes:
        name: what messages call one of them.
        base: their class.
        includes: which layers of that class.
        build: makes the layer on uint8.
        channels: the dimension in which the channels of its values lie, counted from the last, −1.
        rank: how many dimensions its input must have, None for any number.
        ask: returns what else keeps a layer in float, None where nothing does.
    """

    name: str
    base: type[nn.Module]
    includes: Callable[[Any], bool]
    build: Callable[[Any, Numbers], Int8Layer]
    channels: int = -1
    rank: int | None = None
    ask: Callable[[Any], str | None] = lambda layer: None  # noqa: ARG005


def _of_uneven_padding(layer: nn.Conv2d) -> str | None:
    if layer.padding_mode != "zeros":
        return f"it pads with '{layer.padding_mode}', and only zeros are levels of every range"
    return None if pads_evenly(layer) else "it pads more on one side than on the other"


LINEAR = Kind("linear layer", nn.Linear, lambda layer: True, building.linear)  # noqa: ARG005

DEPTHWISE = Kind(
    "depthwise convolution",
    nn.Conv2d,
    lambda layer: layer.groups == layer.in_channels == layer.out_channels,
    building.depthwise,
    channels=-3,
    rank=4,
    ask=_of_uneven_padding,
)

KINDS = (LINEAR, DEPTHWISE)


def find_kind(leaf: nn.Module) -> Kind | None:
    """Return the kind of a layer; None for layers that cannot compute on uint8, whatever they hold."""
    return next((kind for kind in KINDS if isinstance(leaf, kind.base) and kind.includes(leaf)), None)


_SPELLED_OUT: dict[str, type[nn.Module]] = {"timm.layers.linear.Linear": nn.Linear}
"""Classes whose forward computes what that of their base does, by name."""


def runs_as(leaf: nn.Module) -> type[nn.Module]:
    """Return the class whose forward a module runs: one that only adds attributes computes as its base."""
    kind = next(kind for kind in class_of(leaf).__mro__ if "forward" in vars(kind))
    return _SPELLED_OUT.get(f"{kind.__module__}.{kind.__qualname__}", kind)


def without_kind(module: fx.GraphModule) -> dict[str, str]:
    """Return path → reason of the convolutions of which no rule says how they compute on uint8."""
    paths = dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "call_module")
    leaves = {path: module.get_submodule(path) for path in paths}
    others = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, _ConvNd) and find_kind(leaf) is None}
    return {path: _without_rule(leaf) for path, leaf in others.items()}


_HOOKED = "hooks take part in what it computes"


def _without_rule(leaf: _ConvNd) -> str:
    if is_hooked(leaf):
        return _HOOKED
    grouped = " in groups" if leaf.groups != 1 else ""
    remedy = "; im2col makes it a linear layer, which does"
    is_plain_one = class_of(leaf) is nn.Conv2d and is_plain(leaf, "weight") and set(leaf.kernel_size) != {1}
    can_be_linear = is_plain_one and leaf.groups == 1 and pads_evenly(leaf)
    return f"no rule says how a {kind_of(leaf)}{grouped} computes on uint8{remedy if can_be_linear else ''}"


def check_finalized(path: str, layer: nn.Module) -> None:
    """Raise `InputError` for a layer whose zeros are masks still."""
    masks = [name for _, _, name, _ in parametrized(layer, WeightMask)]
    if masks:
        raise InputError(
            f"the {masks[0]} of '{path}' is masked; bake all masks into the weights with fxprune.finalize(module) "
            "before quantising"
        )


def refusal(layer: nn.Module, kind: Kind, calls: list[fx.Node]) -> str | None:
    """Return why a layer of a kind, called by some nodes, cannot compute on uint8; None where it can."""
    if len(calls) > 1:
        return f"it is called {len(calls)} times, with ranges that may differ"
    (call,) = calls
    if len(call.args) != 1 or not isinstance(call.args[0], fx.Node) or call.kwargs:
        return "it is not called as layer(input)"
    if kind.rank is not None and _rank(call.args[0]) != kind.rank:
        return f"its input is not known to have {kind.rank} dimensions"
    if runs_as(layer) is not kind.base:
        return f"what its class {kind_of(layer)} computes may be more than a {kind.name}"
    return next((reason for ask in (*_QUESTIONS, kind.ask) if (reason := ask(layer)) is not None), None)


def _rank(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


def _computed(layer: Any) -> str | None:
    names = [name for name in ("weight", "bias") if parametrize.is_parametrized(layer, name)]
    return f"its {names[0]} is computed by a parametrisation" if names else None


def _hooked(layer: Any) -> str | None:
    hooked = is_hooked(layer) or "weight" not in layer._parameters
    return _HOOKED if hooked else None


def _of_other_dtype(layer: Any) -> str | None:
    dtype = str(layer.weight.dtype).removeprefix("torch.")
    return f"its weight is {dtype}, and only float32 is quantised" if dtype != "float32" else None


def _of_other_size(layer: Any) -> str | None:
    if not layer.weight.numel():
        return "it has no weights"
    products = layer.weight[0].numel()
    fits = products <= MOST_FEATURES
    return None if fits else f"int32 may not hold its sums of {products:,} products; {MOST_FEATURES:,} are the most"


def _without_values(layer: Any) -> str | None:
    return "its weight is on the device meta, without values" if layer.weight.is_meta else None


def _not_finite(layer: Any) -> str | None:
    held = [layer.weight, layer.bias]
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in held if tensor is not None)
    return None if finite else "its weight or bias is not finite"


_QUESTIONS: tuple[Callable[[Any], str | None], ...] = (
    *(_computed, _hooked, _of_other_dtype, _of_other_size, _without_values, _not_finite),
)
"""About every layer with a weight."""
