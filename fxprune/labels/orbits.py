"""Orbits: the classes of channels that live in the same places, each kept or removed class by class.

Paper 001 (ACPLI, §4.1) finds orbits by removing the inbound edges of convolutions and taking weakly connected
components, then treats concatenations as sinks. Here an orbit is what follows from labels: all classes that occupy
the same dimensions of the same parameters and values. The case that the paper discards, a concatenation followed by a
joiner, needs no special treatment: `cat(a, b) + c` gives the orbits {a, c[:Ca]} and {b, c[Ca:]}.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxprune.labels.flow import Reason
from fxprune.labels.places import Places, distinct
from fxprune.labels.propagation import Labelling

if TYPE_CHECKING:
    import networkx

__all__ = ["Member", "Orbit", "Orbits", "Pinned"]


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
        mask: name of the buffer or gate that masks this orbit, None where the graph has no mask for it.
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

    def __init__(self, labelling: Labelling, orbits: tuple[Orbit, ...], places: Places) -> None:
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
            for event in sorted(distinct(events)):
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
