"""Cut parameters and buffers to the positions that stay."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, fx, nn

from fxprune.labels.orbits import Orbits
from fxprune.narrowing.kept import Kept
from fxprune.runtime.weight_masks import full_name, plain_name

__all__ = ["cut_tensors"]


def cut_tensors(module: fx.GraphModule, orbits: Orbits, kept: Kept) -> None:
    """Replace every parameter and buffer that loses positions; tied names stay tied."""
    owners = _owners(module)
    for tensor in orbits.labelling.flow.slots.tensors:
        rows = kept.of_tensor(tensor)
        if all(row is None for row in rows):
            continue
        places = owners[tensor.name]
        narrow = _cut(_read(*places[0]), rows)
        for owner, attribute in places:
            setattr(owner, attribute, narrow)


def _cut(tensor: Tensor, rows: list[Tensor | None]) -> Tensor:
    """Return a copy with the given positions of each dimension; a parameter stays one, with its `requires_grad`."""
    data = tensor.detach()
    for dim, row in enumerate(rows):
        if row is not None:
            data = data.index_select(dim, row.to(data.device))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def _owners(module: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return the first plain name of every tensor → all (module, attribute) that hold it."""
    first: dict[int, str] = {}
    places: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
    for path, part in module.named_modules(remove_duplicate=True):
        for attribute, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                name = first.setdefault(id(tensor), plain_name(full_name(path, attribute)))
                places[name].append((part, attribute))
    return places


def _read(owner: nn.Module, attribute: str) -> Tensor:
    tensor = getattr(owner, attribute)
    assert isinstance(tensor, Tensor)
    return tensor
