"""Orbits: the classes of channels that live in the same places, each kept or removed class by class.

Paper 001 (ACPLI, §4.1) finds orbits by removing the inbound edges of convolutions and taking weakly connected
components, then treats concatenations as sinks. Here an orbit is what follows from labels: all classes that occupy
the same dimensions of the same parameters and values. The case that the paper discards, a concatenation followed by a
joiner, needs no special treatment: `cat(a, b) + c` gives the orbits {a, c[:Ca]} and {b, c[Ca:]}.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.errors import VerifyError
from fxprune.graph.shapes import shapes_of
from fxprune.labels.flow import Labelled, Reason, TensorSlots
from fxprune.labels.propagation import Labelling, propagate_labels
from fxprune.runtime.masks import MASKS, is_mask, mask_channels

if TYPE_CHECKING:
    import networkx

__all__ = ["Member", "Orbit", "Orbits", "Pinned", "find_orbits"]


@dataclass(frozen=True)
class Member:
    """A dimension of a parameter or buffer whose positions belong to an orbit.

    `indices` is int64 [width, multiplicity]: row i are the positions of class i. `role` is the part that the dimension
    plays: "output" or "input" of a weight, "scale" of a batch norm, "" for others.
    """

    parameter: str
    dimension: int
    indices: Tensor
    role: str

    def is_whole(self, size: int) -> bool:
        """Whether the classes are the `size` positions of the dimension, one each and in order."""
        return self.indices.shape == (size, 1) and torch.equal(self.indices[:, 0], torch.arange(size))


@dataclass(frozen=True)
class Orbit:
    """A set of classes with the same signature; each class is one prunable channel.

    Attributes:
        name: `orbit_0`, `orbit_1` … in order of their first slot.
        members: every place that loses positions when a class leaves.
        classes: int64 [width], ids of the classes in the partition.
        producers: nodes that make these channels.
        absorbers: nodes that sum over them; a mask stands before each.
        statistical: why removal is only approximate, None where it is exact.
        mask: name of the buffer that masks this orbit, None where the graph has no mask for it.
    """

    name: str
    members: tuple[Member, ...]
    classes: Tensor
    producers: tuple[str, ...]
    absorbers: tuple[str, ...]
    statistical: Reason | None
    mask: str | None = None

    @property
    def width(self) -> int:
        """Number of classes."""
        return self.classes.numel()

    @property
    def layers(self) -> tuple[str, ...]:
        """Modules whose output channels these are."""
        return tuple(dict.fromkeys(m.parameter.rpartition(".")[0] for m in self.members if m.role == "output"))

    @property
    def channels(self) -> int:
        """Positions of one class in the dimension that makes it: 1, or the channels of a group that leave together."""
        return self.members[0].indices.shape[1]

    def __str__(self) -> str:
        places = ", ".join(f"{m.parameter}[{m.dimension}]" for m in self.members)
        return f"{self.name}: {self.width} × {{{places}}}"


@dataclass(frozen=True)
class Pinned:
    """Positions of a parameter's dimension that may not be removed, and the first reason."""

    parameter: str
    dimension: int
    indices: Tensor
    reason: Reason


class Orbits:
    """The orbits of a graph, and what is pinned and why. Iterates over orbits in order."""

    def __init__(self, labelling: Labelling, orbits: tuple[Orbit, ...], places: _Places) -> None:
        self.labelling = labelling
        self.orbits = orbits
        self.places = places

    def __iter__(self) -> Iterator[Orbit]:
        return iter(self.orbits)

    def __len__(self) -> int:
        return len(self.orbits)

    def __getitem__(self, name: str) -> Orbit:
        for orbit in self.orbits:
            if orbit.name == name:
                return orbit
        raise KeyError(f"no orbit '{name}'; there are {len(self.orbits)}: orbit_0 … orbit_{len(self.orbits) - 1}")

    @cached_property
    def of_class(self) -> Tensor:
        """int64 [classes]: the position in `orbits` of each class's orbit, or -1."""
        found = torch.full((self.labelling.partition.count,), -1)
        for i, orbit in enumerate(self.orbits):
            found[orbit.classes] = i
        return found

    @cached_property
    def pinned(self) -> tuple[Pinned, ...]:
        """What may not be removed, by parameter and dimension; kernel taps are not channels and not listed."""
        part = self.labelling.partition
        rows = []
        for tensor, dim, classes in self.places.dimensions:
            events = part.pinned[classes]
            for event in events.unique().tolist():
                if event >= 0 and "kernel taps" not in part.pins[event].text:
                    indices = (events == event).nonzero().squeeze(1)
                    rows.append(Pinned(tensor.name, dim, indices, part.pins[event]))
        return tuple(rows)

    def to_networkx(self) -> networkx.MultiDiGraph:
        """Return orbits and layers as a graph: producer node → orbit → absorber node; orbits carry their width."""
        import networkx

        graph = networkx.MultiDiGraph()
        for orbit in self.orbits:
            graph.add_node(
                orbit.name, kind="orbit", width=orbit.width, members=[str(m.parameter) for m in orbit.members]
            )
            graph.add_edges_from((producer, orbit.name) for producer in orbit.producers)
            graph.add_edges_from((orbit.name, absorber) for absorber in orbit.absorbers)
        return graph

    def __str__(self) -> str:
        return "\n".join(str(orbit) for orbit in self.orbits)


class _Places:
    """Where the classes of a partition occur: dimensions of tensors, and label vectors of values."""

    def __init__(self, labelling: Labelling) -> None:
        self.labelling = labelling
        self.of_slot = labelling.partition.of_slot

    @cached_property
    def dimensions(self) -> list[tuple[TensorSlots, int, Tensor]]:
        """All (tensor, dimension, class of each position), empty dimensions aside."""
        return [
            (tensor, dim, self.of_slot[start : start + size])
            for tensor in self.labelling.flow.slots.tensors
            for dim, (start, size) in enumerate(zip(tensor.starts, tensor.shape, strict=True))
            if size
        ]

    def signatures(self) -> Tensor:
        """Return for each class a hash of the multiset of dimensions and vectors it occurs in.

        Values count as well as parameters: an orbit then lies wholly inside every dimension that it touches, so one
        kept class an orbit leaves no tensor empty.
        """
        count = self.labelling.partition.count
        # Sums of random 62-bit weights: two different multisets collide with probability 2^-62.
        vectors = [classes for *_, classes in self.dimensions]
        vectors += [self.of_slot[v] for v in self.labelling.vectors]
        generator = torch.Generator().manual_seed(0x0B17)
        weights = torch.randint(-(2**61), 2**61, (len(vectors),), generator=generator)
        signature = torch.zeros(count, dtype=torch.int64)
        if vectors:
            sizes = torch.tensor([v.numel() for v in vectors])
            signature.index_add_(0, torch.cat(vectors), weights.repeat_interleave(sizes))
        return signature

    def owned(self) -> Tensor:
        """Return a mask of the classes that have a position in a parameter."""
        owned = torch.zeros(self.labelling.partition.count, dtype=torch.bool)
        owned[torch.cat([_NONE, *(classes for tensor, _, classes in self.dimensions if tensor.is_parameter)])] = True
        return owned


_NONE = torch.zeros(0, dtype=torch.int64)


def find_orbits(module: fx.GraphModule) -> Orbits:
    """Find which channels of a traced model must leave together, and which may not leave.

    Args:
        module: a GraphModule whose placeholders carry shapes (`fxprune.trace` writes them).

    Masks are transparent: a masked graph has the orbits of the graph without masks, with `Orbit.mask` set. The result
    is kept until the graph, its modules' modes or its tensors' shapes change.

    Raises `InputError` when the graph does not run on those shapes.
    """
    state = _state(module)
    known = _known.get(module)
    if known is None or known[0] != state:
        known = _known[module] = (state, _find(module))
    return _with_masks(module, known[1])


_known: WeakKeyDictionary[fx.GraphModule, tuple[list[Any], Orbits]] = WeakKeyDictionary()


def _state(module: fx.GraphModule) -> list[Any]:
    """Return everything about a module that its orbits depend on, as if it had no masks."""
    nodes = []
    for n in module.graph.nodes:
        if n.target is mask_channels or (n.op == "get_attr" and is_mask(str(n.target))):
            continue
        args, kwargs = n.args, n.kwargs
        if any(i.target is mask_channels for i in n.all_input_nodes):
            args, kwargs = fx.node.map_arg(args, unmasked), fx.node.map_arg(kwargs, unmasked)
        nodes.append((n, n.op, n.target, args, kwargs))
    inputs = [shapes_of(n.meta.get("val")) for n in module.graph.nodes if n.op == "placeholder"]
    named = (*module.named_parameters(), *module.named_buffers())
    tensors = [(name, id(t), t.shape) for name, t in named if not is_mask(name)]
    return [nodes, inputs, tensors, [part.training for name, part in module.named_modules() if name != MASKS]]


def unmasked(node: fx.Node) -> fx.Node:
    """Return the node whose value a chain of masks is applied to; any other node is its own."""
    while node.target is mask_channels:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _with_masks(module: fx.GraphModule, orbits: Orbits) -> Orbits:
    """Find the mask of every orbit by the channels that it is applied to.

    Raises `VerifyError` when a mask is no longer that of one orbit, since a pass changed what is coupled.
    """
    if not hasattr(module, MASKS):
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
    widths = [module.get_buffer(name).numel() for name in names]
    if table:
        joined = torch.full((sum(widths) + 1,), -1)
        joined[module.get_buffer(str(table[0].target)).cpu()] = classes
        classes = joined[:-1]
    for name, held in zip(names, classes.split(widths), strict=True):
        orbit = int(orbits.of_class[held[0]])
        if orbit < 0 or not torch.equal(orbits.orbits[orbit].classes, held):
            raise VerifyError(f"'{name}' is no longer the mask of one orbit; insert masks after other passes")
        yield orbit, name


def _find(module: fx.GraphModule) -> Orbits:
    labelling = propagate_labels(module)
    places = _Places(labelling)
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
    producers, absorbers = _producers(module, labelling, orbit_of), _absorbers(labelling, orbit_of)
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


def _statistical(part: Any, classes: Tensor) -> Reason | None:
    events = part.statistical[classes]
    events = events[events >= 0]
    return part.statistics[int(events.min())] if events.numel() else None


def _group(values: Tensor, rank: Tensor) -> list[Tensor]:
    """Split `values` by their rank 0 … n−1, in order."""
    order = rank.argsort(stable=True)
    return list(values[order].split(rank.bincount().tolist()))


def _members(places: _Places, orbit_of: Tensor, classes: list[Tensor]) -> list[list[Member]]:
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
    inside = inside[position[held[inside]].argsort(stable=True)]
    inside = inside[place[inside].argsort(stable=True)]
    keys, counts = place[inside].unique_consecutive(return_counts=True)
    for key, indices in zip(keys.tolist(), index[inside].split(counts.tolist()), strict=True):
        tensor, dim, _ = dimensions[key // len(classes)]
        owner = key % len(classes)
        role = roles.get(tensor.starts[dim], "")
        members[owner].append(Member(tensor.name, dim, indices.view(classes[owner].numel(), -1), role))
    return members


def _distinct(values: Tensor) -> set[int]:
    """Return the distinct values of a vector that mostly has one."""
    first = values[:1]
    return set(first.tolist()) if bool((values == first).all()) else set(values.unique().tolist())


def _absorbers(labelling: Labelling, orbit_of: Tensor) -> dict[int, list[str]]:
    """Return the nodes that sum over each orbit, in graph order."""
    found: dict[int, dict[str, None]] = defaultdict(dict)
    for event in labelling.flow.absorbed:
        for orbit in sorted(_distinct(orbit_of[labelling.partition.of_slot[event.label]])):
            found[orbit][event.node] = None
    return defaultdict(list, {orbit: list(nodes) for orbit, nodes in found.items()})


def _producers(module: fx.GraphModule, labelling: Labelling, orbit_of: Tensor) -> dict[int, list[str]]:
    """Return the nodes whose value has an orbit's channels although none of their inputs has them.

    These are convolutions and linears that make channels, and parameters that are read directly.
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
                    seen[id(label)] = _distinct(orbit_of[labelling.partition.of_slot[label]]) - {-1}
                inside |= seen[id(label)]
        return inside

    inside = {name: orbits_in(value) for name, value in labelling.values.items()}
    for node in module.graph.nodes:
        inherited = set().union(*(inside.get(i.name, set()) for i in node.all_input_nodes))
        for orbit in inside.get(node.name, set()) - inherited:
            found[orbit][node.name] = None
    return defaultdict(list, {orbit: list(nodes) for orbit, nodes in found.items()})
