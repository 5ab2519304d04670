"""What is known of leaf modules: which attributes repeat a size, and which leaves follow their input's size.

A table by type; a subclass follows its base. A leaf of another type may pass labels through, but one that divides or
reshapes a labelled dimension pins it, since a size may be written inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

__all__ = ["follows_input", "narrowed_attributes"]

Shape = Sequence[int]
Attributes = Callable[[Any, Shape, Shape], dict[str, Any]]
"""(module with narrowed parameters, input shape, output shape) → the attributes that repeat a size."""


def _convolution(module: Any, inputs: Shape, outputs: Shape) -> dict[str, Any]:
    channel = -(module.weight.dim() - 1)
    in_channels, out_channels = inputs[channel], outputs[channel]
    grouped = out_channels if module.transposed else in_channels
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "groups": grouped // module.weight.shape[1],
    }


def _linear(module: Any, inputs: Shape, outputs: Shape) -> dict[str, Any]:
    return {"in_features": inputs[-1], "out_features": outputs[-1]}


def _batch_norm(module: Any, inputs: Shape, outputs: Shape) -> dict[str, Any]:
    return {"num_features": inputs[1]}


def _group_norm(module: Any, inputs: Shape, outputs: Shape) -> dict[str, Any]:
    width = module.num_channels // module.num_groups
    groups = 1 if module.num_groups == 1 else inputs[1] // width
    return {"num_channels": inputs[1], "num_groups": groups}


def _trailing_norm(module: Any, inputs: Shape, outputs: Shape) -> dict[str, Any]:
    return {"normalized_shape": tuple(inputs[-len(module.normalized_shape) :])}


def _prelu(module: Any, inputs: Shape, outputs: Shape) -> dict[str, Any]:
    return {"num_parameters": module.weight.numel()}


def _embedding(module: Any, inputs: Shape, outputs: Shape) -> dict[str, Any]:
    return {"embedding_dim": outputs[-1]}


def _none(module: Any, inputs: Shape, outputs: Shape) -> dict[str, Any]:
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


def narrowed_attributes(module: nn.Module, inputs: Shape, outputs: Shape) -> dict[str, Any]:
    """Return the attributes that repeat a size, for the shapes that the leaf now takes and gives."""
    attributes = _entry(module)
    return {} if attributes is None else attributes(module, inputs, outputs)
