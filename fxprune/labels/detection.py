"""Find orbits: propagate labels, group classes by where they occur, and attach masks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.errors import VerifyError
from fxprune.graph.shapes import shapes_of
from fxprune.labels.attention import attention_of, label_channels
from fxprune.labels.flow import Labelled, Reason
from fxprune.labels.orbits import Member, Orbit, Orbits
from fxprune.labels.partition import Partition
from fxprune.labels.places import Places, distinct
from fxprune.labels.propagation import Labelling
from fxprune.runtime.masks import MASKS, has_masks, is_mask, mask_channels, mask_values, reads_mask

__all__ = ["find_orbits", "unmasked"]


def find_orbits(module: fx.GraphModule, attention: str | None = None) -> Orbits:
    """Find which channels of a traced model must leave together, and which may not leave.

    Args:
        module: a GraphModule whose placeholders carry shapes (`fxprune.trace` writes them).
        attention: what leaves attention: "dimensions" (the same of every head) or "heads" (whole heads). By default
            what the graph is masked for, "dimensions" where it has no masks.

    Masks are transparent: a masked graph has the orbits of the graph without masks, with `Orbit.mask` set. The result
    is kept until the graph, its modules' modes or its tensors' shapes change.

    Raises:
        InputError: the graph does not run on those shapes.
        SpecError: there is no such policy for attention.
        UsageError: the graph is masked for another one.
    """
    policy = attention_of(module, attention)
    state = [policy, *_state(module)]
    known = _known.get(module)
    if known is None or known[0] != state:
        known = _known[module] = (state, _find(module, policy))
    return _with_masks(module, known[1])


_known: WeakKeyDictionary[fx.GraphModule, tuple[list[Any], Orbits]] = WeakKeyDictionary()


def _state(module: fx.GraphModule) -> list[Any]:
    """Return everything about a module that its orbits depend on, as if it had no masks.

    Nodes are named, not held: a node holds its graph, and that its module, which could then never be freed.
    """

    def name_of(node: fx.Node) -> str:
        return f"%{unmasked(node).name}"

    nodes = [
        (n.name, n.op, n.target, fx.node.map_arg(n.args, name_of), fx.node.map_arg(n.kwargs, name_of))
        for n in module.graph.nodes
        if n.target is not mask_channels and not reads_mask(n)
    ]
    inputs = [shapes_of(n.meta.get("val")) for n in module.graph.nodes if n.op == "placeholder"]
    parts = [
        (name, part.training, _tensors(part))
        for name, part in module.named_modules()
        if name != MASKS and not is_mask(name)
    ]
    return [nodes, inputs, parts]


def _tensors(part: nn.Module) -> list[tuple[int, torch.Size]]:
    held = (*part._parameters.values(), *part._buffers.values())
    return [(id(tensor), tensor.shape) for tensor in held if tensor is not None]


def unmasked(node: fx.Node) -> fx.Node:
    """Return the node whose value a chain of masks is applied to; any other node is its own."""
    while node.target is mask_channels:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _with_masks(module: fx.GraphModule, orbits: Orbits) -> Orbits:
    """Find the mask of every orbit by the channels that it is applied to.

    Raises `VerifyError` when a mask is no longer that of one orbit, since a pass changed what is coupled.
    """
    if not has_masks(module):
        return orbits
    masks: dict[int, str] = {}
    for node in module.graph.nodes:
        if node.target is mask_channels:
            masks.update(_masks_at(module, node, orbits))
    found = (replace(orbit, mask=masks.get(i)) for i, orbit in enumerate(orbits))
    return Orbits(orbits.labelling, tuple(found), orbits.places)


def _masks_at(module: fx.GraphModule, node: fx.Node, orbits: Orbits) -> Iterator[tuple[int, str]]:
    """Yield (position of the orbit, mask) for every mask of one mask node."""
    arguments: tuple[Any, ...] = node.args
    source, masks, dim, *table = arguments
    value = orbits.labelling.values[unmasked(source).name]
    classes = orbits.labelling.partition.of_slot[value.labels[dim]]
    names = [str(mask.target) for mask in masks]
    widths = [mask_values(module, name).numel() for name in names]
    if table:
        joined = torch.full((sum(widths) + 1,), -1)
        joined[module.get_buffer(str(table[0].target)).cpu()] = classes
        classes = joined[:-1]
    for name, held in zip(names, classes.split(widths), strict=True):
        orbit = int(orbits.of_class[held[0]])
        if orbit < 0 or not torch.equal(orbits.orbits[orbit].classes, held):
            raise VerifyError(f"'{name}' is no longer the mask of one orbit; insert masks after other passes")
        yield orbit, name


def _find(module: fx.GraphModule, policy: str) -> Orbits:
    labelling = label_channels(module, policy)
    places = Places(labelling)
    part = labelling.partition
    free = ((part.pinned < 0) & places.owned()).nonzero().squeeze(1)
    if not free.numel():
        return Orbits(labelling, (), places)
    _, inverse = places.signatures()[free].unique(return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), free.numel()).scatter_reduce_(
        0, inverse, torch.arange(free.numel()), "amin"
    )
    rank = first.argsort().argsort()[inverse]
    orbit_of = torch.full((part.count,), -1)
    orbit_of[free] = rank
    classes = _group(free, rank)
    members = _members(places, orbit_of, classes)
    absorbers = _absorbers(labelling, orbit_of)
    producers = _producers(module, labelling, orbit_of, absorbers)
    orbits = tuple(
        Orbit(
            f"orbit_{i}",
            tuple(members[i]),
            ids,
            tuple(producers[i]),
            tuple(absorbers[i]),
            _statistical(part, ids),
        )
        for i, ids in enumerate(classes)
    )
    return Orbits(labelling, orbits, places)


def _statistical(part: Partition, classes: Tensor) -> Reason | None:
    events = part.statistical[classes]
    events = events[events >= 0]
    return part.statistics[int(events.min())] if events.numel() else None


def _group(values: Tensor, rank: Tensor) -> list[Tensor]:
    """Split `values` by their rank 0 … n−1, in order."""
    order = rank.argsort(stable=True)
    return list(values[order].split(rank.bincount().tolist()))


def _members(places: Places, orbit_of: Tensor, classes: list[Tensor]) -> list[list[Member]]:
    """Return the members of every orbit: the positions of its classes in every dimension of every tensor."""
    roles = places.labelling.flow.roles
    members: list[list[Member]] = [[] for _ in classes]
    dimensions = places.dimensions
    if not dimensions:
        return members
    position = torch.zeros(orbit_of.numel(), dtype=torch.int64)
    for ids in classes:
        position[ids] = torch.arange(ids.numel())
    sizes = torch.tensor([held.numel() for *_, held in dimensions])
    held = torch.cat([held for *_, held in dimensions])
    index = torch.cat([torch.arange(int(size)) for size in sizes])
    orbit = orbit_of[held]
    place = torch.arange(len(dimensions)).repeat_interleave(sizes) * len(classes) + orbit
    # Sorted by dimension, orbit, class and index, each run of one dimension and orbit is a member.
    inside = (orbit >= 0).nonzero().squeeze(1)
    order = (place * orbit_of.numel() + position[held])[inside]
    inside = inside[order.argsort(stable=True)]
    keys, counts = place[inside].unique_consecutive(return_counts=True)
    for key, indices in zip(keys.tolist(), index[inside].split(counts.tolist()), strict=True):
        tensor, dim, _ = dimensions[key // len(classes)]
        owner = key % len(classes)
        role = roles.get(tensor.starts[dim], "")
        members[owner].append(Member(tensor.name, dim, indices.view(classes[owner].numel(), -1), role))
    return members


def _absorbers(labelling: Labelling, orbit_of: Tensor) -> dict[int, list[str]]:
    """Return the nodes that sum over each orbit, in graph order."""
    found: dict[int, dict[str, None]] = defaultdict(dict)
    for event in labelling.flow.absorbed:
        for orbit in sorted(distinct(orbit_of[labelling.partition.of_slot[event.label]])):
            found[orbit][event.node] = None
    return defaultdict(list, {orbit: list(nodes) for orbit, nodes in found.items()})


def _producers(
    module: fx.GraphModule, labelling: Labelling, orbit_of: Tensor, absorbers: dict[int, list[str]]
) -> dict[int, list[str]]:
    """Return the nodes whose value has an orbit's channels although no input hands them on.

    These are convolutions and linears, which absorb what they take and make channels anew, and parameters that are
    read directly.
    """
    found: dict[int, dict[str, None]] = defaultdict(dict)
    seen: dict[int, set[int]] = {}

    def orbits_in(value: Any) -> set[int]:
        inside: set[int] = set()
        for leaf in pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, Labelled)):
            for label in leaf.labels if isinstance(leaf, Labelled) else ():
                if label is None:
                    continue
                if id(label) not in seen:
                    seen[id(label)] = distinct(orbit_of[labelling.partition.of_slot[label]]) - {-1}
                inside |= seen[id(label)]
        return inside

    inside = {name: orbits_in(value) for name, value in labelling.values.items()}
    for node in module.graph.nodes:
        inherited = set().union(*(inside.get(i.name, set()) for i in node.all_input_nodes))
        for orbit in sorted(inside.get(node.name, set())):
            if orbit not in inherited or node.name in absorbers[orbit]:
                found[orbit][node.name] = None
    return defaultdict(list, {orbit: list(nodes) for orbit, nodes in found.items()})
