"""The weights of a graph that can be made sparse: those of convolutions and linear layers, and what each costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from fxprune.errors import SpecError, nearest
from fxprune.runtime.weight_masks import WeightMask, kind_of, parametrized
from fxprune.selection import match_layers

__all__ = ["KINDS", "SparseLayer", "choose_layers", "find_layers", "mask_of"]


@dataclass(frozen=True)
class SparseLayer:
    """One weight that a convolution or a linear layer reads; tied weights are one.

    Attributes:
        name: path of the first layer that reads it.
        owners: every (path, module) that holds it as `weight`, readers first.
        nodes: the calls of those layers.
        shape: of the weight.
        output_dim, input_dim: which dimensions of the weight are contracted to, and over.
        uses: multiply-accumulates of one weight, in all calls together.
    """

    name: str
    owners: tuple[tuple[str, nn.Module], ...]
    nodes: tuple[str, ...]
    shape: torch.Size
    output_dim: int
    input_dim: int
    uses: int

    @property
    def weight(self) -> Tensor:
        """The weight as it acts, with the zeros that it has; detached."""
        weight: Tensor = self.owners[0][1].weight  # type: ignore[assignment]
        return weight.detach()

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return next(self.owners[0][1].parameters()).device

    @property
    def parameter(self) -> str:
        """Plain name of the weight."""
        return f"{self.name}.weight"

    def is_kind(self, kind: str) -> bool:
        """Whether the layer is of one of the `KINDS`."""
        linear = len(self.shape) == 2
        return {
            "linear": linear,
            "conv": not linear,
            "conv1x1": not linear and set(self.shape[2:]) == {1},
            "all": True,
        }[kind]


KINDS = ("conv1x1", "conv", "linear", "all")
"""Words for layers by what they compute: 1×1 convolutions (the default, as in paper 000), any, linear layers, all."""


def find_layers(module: fx.GraphModule, macs: Mapping[str, int]) -> list[SparseLayer]:
    """Return the weights of a graph's convolutions and linear layers in the order of their first call.

    Args:
        module: the graph.
        macs: dense multiply-accumulates of every node that has any (`CostModel.macs_by_node`).
    """
    calls: dict[int, list[fx.Node]] = defaultdict(list)
    for node in module.graph.nodes:
        if node.op == "call_module":
            leaf = module.get_submodule(str(node.target))
            if isinstance(leaf, (nn.Linear, _ConvNd)):
                calls[id(_original(leaf))].append(node)
    holders = _holders(module)
    return [_layer(module, nodes, holders[key], macs) for key, nodes in calls.items()]


def _layer(
    module: fx.GraphModule, nodes: list[fx.Node], holders: list[tuple[str, nn.Module]], macs: Mapping[str, int]
) -> SparseLayer:
    readers = {str(node.target): module.get_submodule(str(node.target)) for node in nodes}
    leaf = next(iter(readers.values()))
    held = {id(part) for part in readers.values()}
    owners = (*readers.items(), *((path, part) for path, part in holders if id(part) not in held))
    dims = (1, 0) if isinstance(leaf, _ConvTransposeNd) else (0, 1)
    shape = _original(leaf).shape
    uses = sum(macs.get(node.name, 0) for node in nodes) // max(shape.numel(), 1)
    return SparseLayer(next(iter(readers)), owners, tuple(node.name for node in nodes), shape, *dims, uses)


def _original(part: nn.Module) -> Tensor:
    """Return the tensor in the shape of a weight that it is computed from, or that it is; tied weights have one."""
    if not parametrize.is_parametrized(part, "weight"):
        return part._parameters["weight"]  # type: ignore[return-value]
    held: Any = part.parametrizations
    # Weight norm keeps a magnitude and a direction, which is in the weight's shape and comes last.
    return list(held.weight.parameters(recurse=False))[-1]


def _holders(module: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Return for every weight the modules that hold it as `weight`."""
    holders: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for path, part in module.named_modules():
        if path and ("weight" in part._parameters or parametrize.is_parametrized(part, "weight")):
            holders[id(_original(part))].append((path, part))
    return holders


def mask_of(layer: SparseLayer) -> Tensor | None:
    """Return the mask of a layer's weight, bool in its shape, None where it has none."""
    owner = layer.owners[0][1]
    return next((part.mask for _, _, name, part in parametrized(owner, WeightMask) if name == "weight"), None)


def choose_layers(
    module: fx.GraphModule, layers: Iterable[SparseLayer], include: Iterable[str], exclude: Iterable[str] = ()
) -> list[SparseLayer]:
    """Return the layers that any of `include` and none of `exclude` names.

    A name is one of `KINDS`, or the path, a glob over paths, or the type of a layer. A tied weight goes by all its
    layers. Raises `SpecError` for a name that matches no convolution or linear layer.
    """
    known = list(layers)
    chosen = {layer.name for pattern in include for layer in _matching(module, known, pattern)}
    chosen -= {layer.name for pattern in exclude for layer in _matching(module, known, pattern)}
    return [layer for layer in known if layer.name in chosen]


def _matching(module: fx.GraphModule, layers: list[SparseLayer], pattern: str) -> list[SparseLayer]:
    if pattern in KINDS:
        found = [layer for layer in layers if layer.is_kind(pattern)]
    else:
        paths = match_layers([pattern], module)
        found = [layer for layer in layers if paths.intersection(path for path, _ in layer.owners)]
    if not found:
        present = ", ".join(f"{sum(layer.is_kind(kind) for layer in layers)} {kind}" for kind in KINDS[:3])
        raise SpecError(
            f"no convolution or linear layer matches '{pattern}'; the model has {present}: choose layers by these "
            f"words, or by name, glob or type ({nearest(pattern, {kind_of(layer.owners[0][1]) for layer in layers})})"
        )
    return found
