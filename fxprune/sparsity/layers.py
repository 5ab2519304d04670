"""The weights of a graph that can be made sparse: those of convolutions and linear layers, and what each costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _get_attr
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from fxprune.errors import SpecError, nearest
from fxprune.runtime.weight_masks import kind_of, plain_name, weight_mask
from fxprune.selection import match_layers
from fxprune.sparsity.reading import reads_plainly

__all__ = [
    "DEFAULT_LAYERS",
    "KINDS",
    "SparseLayer",
    "choose_layers",
    "find_layers",
    "is_kind",
    "mask_of",
    "other_weights",
]


@dataclass(frozen=True)
class SparseLayer:
    """One weight that a convolution or a linear layer reads; tied weights are one.

    Attributes:
        name: path of the first layer that reads it.
        owners: every (path, module, attribute) that holds it, the layers that read it first.
        nodes: the calls of those layers.
        shape: of the weight.
        output_dim, input_dim: which dimensions of the weight are contracted to, and over.
        uses: multiply-accumulates of one weight, in all calls together.
    """

    name: str
    owners: tuple[tuple[str, nn.Module, str], ...]
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
    def original(self) -> Tensor:
        """The parameter in the weight's shape that it is computed from, or that it is."""
        return _original(*self.owners[0][1:])

    @property
    def parameters(self) -> tuple[str, ...]:
        """All plain names of the weight."""
        return tuple(f"{path}.{attribute}" for path, _, attribute in self.owners)

    def is_kind(self, kind: str) -> bool:
        """Whether the layer is of one of the `KINDS`."""
        return is_kind(self.shape, kind)


KINDS = ("conv1x1", "conv", "linear", "all")
"""Words for layers by what they compute: 1×1 convolutions (the default, as in paper 000), any, linear layers, all."""


DEFAULT_LAYERS = ("conv1x1",)
"""What paper 000 prunes."""


def is_kind(shape: torch.Size, kind: str) -> bool:
    """Whether a weight of this shape is that of one of the `KINDS`."""
    linear = len(shape) == 2
    return {
        "linear": linear,
        "conv": not linear,
        "conv1x1": not linear and set(shape[2:]) == {1},
        "all": True,
    }[kind]


def find_layers(module: fx.GraphModule, macs: Mapping[str, int]) -> list[SparseLayer]:
    """Return the weights of a graph's convolutions and linear layers in the order of their first call.

    A weight that a hook computes (`torch.nn.utils.weight_norm`) cannot be masked, nor one that the graph itself holds,
    nor one that its layer standardises before use.

    Args:
        module: the graph.
        macs: dense multiply-accumulates of every node that has any (`CostModel.macs_by_node`).
    """
    calls: dict[int, list[fx.Node]] = defaultdict(list)
    for node in module.graph.nodes:
        if node.op == "call_module":
            leaf = module.get_submodule(str(node.target))
            if isinstance(leaf, (nn.Linear, _ConvNd)) and "weight" in _held(leaf) and reads_plainly(leaf):
                calls[id(_original(leaf, "weight"))].append(node)
    holders = _holders(module)
    own = {id(parameter) for parameter in module._parameters.values()}
    return [_layer(module, nodes, holders[key], macs) for key, nodes in calls.items() if key not in own]


def _layer(
    module: fx.GraphModule, nodes: list[fx.Node], holders: list[tuple[str, nn.Module, str]], macs: Mapping[str, int]
) -> SparseLayer:
    readers = {str(node.target): module.get_submodule(str(node.target)) for node in nodes}
    leaf = next(iter(readers.values()))
    read = {(id(part), "weight") for part in readers.values()}
    others = (holder for holder in holders if (id(holder[1]), holder[2]) not in read)
    owners = (*((path, part, "weight") for path, part in readers.items()), *others)
    dims = (1, 0) if isinstance(leaf, _ConvTransposeNd) else (0, 1)
    shape = _original(leaf, "weight").shape
    uses = sum(macs.get(node.name, 0) for node in nodes) // max(shape.numel(), 1)
    return SparseLayer(next(iter(readers)), owners, tuple(node.name for node in nodes), shape, *dims, uses)


def _original(part: nn.Module, attribute: str) -> Tensor:
    """Return the parameter in the shape of a tensor that it is computed from, or that it is; tied ones have one."""
    if not parametrize.is_parametrized(part, attribute):
        return part._parameters[attribute]  # type: ignore[return-value]
    held: Any = part.parametrizations
    # Weight norm keeps a magnitude and a direction, which is in the weight's shape and comes last.
    return list(held[attribute].parameters(recurse=False))[-1]


def _held(part: nn.Module) -> Iterator[str]:
    """Yield the attributes of a module that are parameters, or are computed from one by a parametrisation."""
    yield from (attribute for attribute, parameter in part._parameters.items() if parameter is not None)
    if parametrize.is_parametrized(part):
        held: Any = part.parametrizations
        yield from (attribute for attribute, chain in held.items() if [*chain.parameters(recurse=False)])


def _holders(module: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Return by id of a parameter all (path, module, attribute) that hold it, the module itself left out."""
    holders: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
    for path, part in module.named_modules():
        if path and not isinstance(part, parametrize.ParametrizationList):
            for attribute in _held(part):
                holders[id(_original(part, attribute))].append((path, part, attribute))
    return holders


def other_weights(
    module: fx.GraphModule, layers: Sequence[SparseLayer], macs: Mapping[str, int]
) -> dict[str, torch.Size]:
    """Return the shapes of the other matrices and kernels that do multiply-accumulates, by plain name.

    They are read by functions (`F.linear(x, self.weight)`), or within modules that are one node (`nn.LSTM`).
    """
    names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    known = {id(layer.original) for layer in layers}
    calls = {node for layer in layers for node in layer.nodes}
    found: dict[str, torch.Size] = {}
    constant: dict[fx.Node, list[Tensor]] = {}
    for node in module.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr":
            constant[node] = _parameters_of(module, str(node.target))
        elif sources and all(source in constant for source in sources) and not macs.get(node.name):
            constant[node] = [tensor for source in sources for tensor in constant[source]]
        elif macs.get(node.name):
            read = [tensor for source in sources for tensor in constant.get(source, ())]
            if node.op == "call_module" and node.name not in calls:
                read += module.get_submodule(str(node.target)).parameters()
            found |= {names[id(t)]: t.shape for t in read if _is_matrix(t) and id(t) in names and id(t) not in known}
    return found


def _is_matrix(tensor: Tensor) -> bool:
    return sum(size > 1 for size in tensor.shape) > 1


def _parameters_of(module: fx.GraphModule, target: str) -> list[Tensor]:
    """Return the parameter that a node reads, or that what it reads is computed from."""
    path, _, attribute = target.rpartition(".")
    owner = _get_attr(module, path) if path else module
    return [_original(owner, attribute)] if isinstance(owner, nn.Module) and attribute in _held(owner) else []


def mask_of(layer: SparseLayer) -> Tensor | None:
    """Return the mask of a layer's weight, bool in its shape, None where it has none."""
    found = weight_mask(*layer.owners[0][1:])
    return None if found is None else found.mask


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
        found = [layer for layer in layers if paths.intersection(path for path, _, _ in layer.owners)]
    if not layers:
        raise SpecError(
            f"no layer matches '{pattern}': the graph calls no convolution or linear layer of torch.nn whose weight "
            "can be masked. What functions or hooks read stays dense, and torch.export makes all layers functions; "
            "give a model of such layers, a single one in nn.Sequential, and the front end 'symbolic'"
        )
    if not found:
        present = ", ".join(f"{sum(layer.is_kind(kind) for layer in layers)} {kind}" for kind in KINDS[:3])
        raise SpecError(
            f"no convolution or linear layer matches '{pattern}'; the model has {present}: choose layers by these "
            f"words, or by name, glob or type ({nearest(pattern, {kind_of(layer.owners[0][1]) for layer in layers})})"
        )
    return found
