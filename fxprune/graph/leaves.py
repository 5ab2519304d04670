"""What is known of leaf modules: which attributes repeat a size, and which leaves follow their input's size.

A table by type; a subclass follows its base. A leaf of another type may pass labels through, but one that divides or
reshapes a labelled dimension pins it, since a size may be written inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["follows_input", "narrowed_attributes"]


@dataclass(frozen=True)
class _Narrow:
    """A leaf whose parameters are cut, and the shapes that it takes and gives now."""

    module: Any
    inputs: Sequence[int]
    outputs: Sequence[int]


Attributes = Callable[[_Narrow], dict[str, Any]]
"""Returns the attributes of a leaf that repeat a size."""


def _convolution(leaf: _Narrow) -> dict[str, Any]:
    weight = leaf.module.weight
    channel = -(weight.dim() - 1)
    in_channels, out_channels = leaf.inputs[channel], leaf.outputs[channel]
    grouped = out_channels if leaf.module.transposed else in_channels
    return {"in_channels": in_channels, "out_channels": out_channels, "groups": grouped // weight.shape[1]}


def _linear(leaf: _Narrow) -> dict[str, Any]:
    return {"in_features": leaf.inputs[-1], "out_features": leaf.outputs[-1]}


def _batch_norm(leaf: _Narrow) -> dict[str, Any]:
    return {"num_features": leaf.inputs[1]}


def _group_norm(leaf: _Narrow) -> dict[str, Any]:
    width = leaf.module.num_channels // leaf.module.num_groups
    groups = 1 if leaf.module.num_groups == 1 else leaf.inputs[1] // width
    return {"num_channels": leaf.inputs[1], "num_groups": groups}


def _trailing_norm(leaf: _Narrow) -> dict[str, Any]:
    return {"normalized_shape": tuple(leaf.inputs[-len(leaf.module.normalized_shape) :])}


def _prelu(leaf: _Narrow) -> dict[str, Any]:
    return {"num_parameters": leaf.module.weight.numel()}


def _embedding(leaf: _Narrow) -> dict[str, Any]:
    return {"embedding_dim": leaf.outputs[-1]}


def _none(_: _Narrow) -> dict[str, Any]:
    return {}


_TABLE: tuple[tuple[type[nn.Module], Attributes], ...] = (
    (nn.modules.conv._ConvNd, _convolution),
    (nn.Linear, _linear),
    (nn.modules.batchnorm._NormBase, _batch_norm),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _trailing_norm),
    (nn.RMSNorm, _trailing_norm),
    (nn.PReLU, _prelu),
    (nn.Embedding, _embedding),
    (nn.Flatten, _none),
    (nn.PixelShuffle, _none),
    (nn.PixelUnshuffle, _none),
)


def _entry(module: nn.Module) -> Attributes | None:
    return next((attributes for kind, attributes in _TABLE if isinstance(module, kind)), None)


def follows_input(module: nn.Module) -> bool:
    """Whether this leaf is right again once its parameters are cut and its attributes assigned.

    >>> follows_input(nn.Flatten()), follows_input(nn.Unflatten(1, (2, 2)))
    (True, False)
    """
    return _entry(module) is not None


def narrowed_attributes(module: nn.Module, inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, Any]:
    """Return the attributes that repeat a size, for the shapes that the leaf now takes and gives."""
    attributes = _entry(module)
    return {} if attributes is None else attributes(_Narrow(module, inputs, outputs))
