"""Weight masks: what a sparse module holds for every pruned weight, as torch's own parametrisation.

A masked weight is `original × mask`. Training keeps its zeros at zero, because no gradient passes where the mask is
False and the optimiser only ever sees `original`. The masks are buffers: they move, copy and save with the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "WeightMask",
    "class_of",
    "effective_parameters",
    "finalize",
    "full_name",
    "is_plain",
    "is_weight_mask",
    "kind_of",
    "mask_weight",
    "masked_weights",
    "own_class",
    "parametrized",
    "place_of",
    "plain_name",
    "unparametrize",
    "weight_mask",
]


_Module = TypeVar("_Module", bound=nn.Module)


class WeightMask(nn.Module):
    """Multiplies a weight by a bool mask of its shape.

    >>> import torch
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> mask_weight([(layer, "weight")], torch.tensor([[True, False]]))
    >>> layer.weight == 0, [name for name in layer.state_dict()]
    (tensor([[False,  True]]), ['parametrizations.weight.original', 'parametrizations.weight.0.mask'])
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros where the mask is False."""
        return weight * self.mask


def parametrized(module: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """Yield (path, module, tensor name, parametrisation) of all parametrisations of a kind, tied ones at each place."""
    for path, owner in module.named_modules():
        if parametrize.is_parametrized(owner):
            held: Any = owner.parametrizations
            for name, chain in held.items():
                yield from ((path, owner, name, part) for part in chain if isinstance(part, kind))


def masked_weights(module: nn.Module) -> dict[str, WeightMask]:
    """Return the masks of a module by the plain names of their weights (`conv1.weight`)."""
    return {full_name(path, name): mask for path, _, name, mask in parametrized(module, WeightMask)}


_MASK = re.compile(r"(^|\.)parametrizations\.\w+\.\d+\.mask$")


def is_weight_mask(name: str) -> bool:
    """Whether a buffer's name is that of a weight mask.

    >>> is_weight_mask("conv1.parametrizations.weight.0.mask"), is_weight_mask("attention.mask")
    (True, False)
    """
    return _MASK.search(name) is not None


def effective_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters by their plain names; masked weights with their zeros, detached."""
    found: dict[str, Tensor] = {plain_name(name): parameter for name, parameter in module.named_parameters()}
    for path, owner, name, _ in parametrized(module, WeightMask):
        found[full_name(path, name)] = getattr(owner, name).detach()
    return found


def plain_name(name: str) -> str:
    """Return the name that a tensor has where its module is not parametrised.

    >>> plain_name("conv1.parametrizations.weight.original"), plain_name("conv1.bias")
    ('conv1.weight', 'conv1.bias')
    """
    owner, found, rest = name.partition("parametrizations.")
    return f"{owner}{rest.removesuffix('.original')}" if found and rest.endswith(".original") else name


def kind_of(module: nn.Module) -> str:
    """Return the name of a module's type, without what parametrising made of it.

    >>> import torch
    >>> layer = nn.Linear(2, 1)
    >>> mask_weight([(layer, "weight")], torch.ones(1, 2, dtype=torch.bool))
    >>> type(layer).__name__, kind_of(layer)
    ('ParametrizedLinear', 'Linear')
    """
    return class_of(module).__name__


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, without what parametrising made of it."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def mask_weight(owners: Iterable[tuple[nn.Module, str]], mask: Tensor) -> None:
    """Mask one weight, given by all (module, attribute) that hold it; a mask that it has is narrowed.

    Args:
        owners: tied weights share one mask, and stay tied.
        mask: bool, in the shape of the weight; False is zero.
    """
    made: WeightMask | None = None
    for owner, name in owners:
        known = weight_mask(owner, name)
        if known is not None:
            known.mask = known.mask & mask
            continue
        made = WeightMask(mask) if made is None else made
        own_class(owner)
        parametrize.register_parametrization(owner, name, made, unsafe=True)


def weight_mask(owner: nn.Module, name: str) -> WeightMask | None:
    """Return the mask of one tensor of a module, None where it has none."""
    if not parametrize.is_parametrized(owner, name):
        return None
    held: Any = owner.parametrizations
    return next((part for part in held[name] if isinstance(part, WeightMask)), None)


def is_plain(owner: nn.Module, name: str) -> bool:
    """Whether a tensor is a parameter as it is, but for masks."""
    if not parametrize.is_parametrized(owner, name):
        return True
    held: Any = owner.parametrizations
    return all(isinstance(part, WeightMask) for part in held[name])


def place_of(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module and attribute that keep the parameter of a tensor, itself or what one is computed from.

    >>> layer = nn.utils.parametrizations.orthogonal(nn.Linear(2, 2))
    >>> place_of(layer, "bias")[1], place_of(layer, "weight")[1]
    ('bias', 'original')
    """
    if not parametrize.is_parametrized(owner, name):
        return owner, name
    held: Any = owner.parametrizations
    return held[name], "original"


def finalize(module: _Module) -> _Module:
    """Bake all weight masks into the weights, in place; return the module.

    What is left are ordinary parameters with zeros, under the names that they had before.
    """
    for _, owner, name, _ in list(parametrized(module, WeightMask)):
        unparametrize(owner, name)
    return module


def unparametrize(owner: nn.Module, name: str) -> None:
    """Replace a parametrised tensor by the value that it has in evaluation, without touching copies of its module."""
    own_class(owner)
    held: Any = owner.parametrizations
    parts = [part for part in held[name].modules() if part.training]
    try:
        for part in parts:
            part.training = False  # reading a spectral norm in training changes it
        parametrize.remove_parametrizations(owner, name, leave_parametrized=True)
    finally:
        for part in parts:
            part.training = True


def own_class(owner: nn.Module) -> None:
    """Give a parametrised module a class of its own: copies share the one that torch writes its properties into."""
    if not parametrize.is_parametrized(owner):
        return
    kind = type(owner)
    attributes = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    owner.__class__ = type(kind.__name__, kind.__bases__, attributes)


def full_name(path: str, name: str) -> str:
    """Return the name of what the module at a path calls `name`; the path of the model itself is empty."""
    return f"{path}.{name}" if path else name
