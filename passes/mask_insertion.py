"""Put a mask for every orbit before every operator that absorbs its channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxprune.errors import SpecError, UsageError
from fxprune.gating.insertion import GateOptions, insert_gates
from fxprune.graph.passes import Pass
from fxprune.labels.attention import POLICIES, attention_of, check_attention, keep_attention
from fxprune.labels.detection import find_orbits
from fxprune.labels.flow import Labelled
from fxprune.labels.orbits import Orbit, Orbits
from fxprune.runtime.masks import MASKS, ChannelMasks, gates_of, has_masks, mask_channels
from fxprune.selection import Constraints, eligible_orbits

__all__ = ["KINDS", "MaskInsertion"]

KINDS = ("mask", "gate")
"""Masks of ones that others write into, or gates that learn what to keep."""


@dataclass(frozen=True)
class MaskInsertion(Pass):
    """One mask of ones per orbit, applied right before every operator that absorbs its channels (paper 001, §3).

    Before: `%conv2 = conv2(%relu)`
    After: `%orbit_0 = get channel_masks.orbit_0`, `%mask = mask_channels(%relu, [%orbit_0], 1)`,
    `%conv2 = conv2(%mask)`

    Where the channels of several orbits meet (concatenation, flatten, shuffle), an index table says which mask each
    channel has. An orbit of one class has no mask: it can lose nothing. The masks are the plan: zeros written into
    them are what `channel-surgery` cuts.

    `attention` says what leaves attention: "dimensions", the same of every head, or "heads", whole heads. The masked
    graph keeps it, so that every later pass finds the same orbits.

    With `kind` "gate" masks learn (§3): `%orbit_0 = channel_masks.orbit_0 PredictedGate(…)(%conv1)` looks at the
    convolution of the orbit with the largest kernel and samples the mask. `block`, `logits`, `initial`, `temperature`
    and `momentum` are those of `fxprune.gating.insertion.GateOptions`; `include`, `exclude` and `allow_statistical` say
    which orbits, as in `channel-selection`. The others keep plain masks.
    """

    name: ClassVar[str] = "mask-insertion"

    attention: str = POLICIES[0]
    kind: str = KINDS[0]
    block: int = GateOptions.block
    logits: str = GateOptions.logits
    initial: float = GateOptions.initial
    temperature: float = GateOptions.temperature
    momentum: float = GateOptions.momentum
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_statistical: bool = False

    def __post_init__(self) -> None:
        check_attention(self.attention)
        if self.kind not in KINDS:
            raise SpecError(f"unknown kind of masks '{self.kind}'; known kinds: {', '.join(KINDS)}")
        self._options()

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Insert masks, and make them gates where those are wanted; what is there already is left alone.

        Raises `UsageError` for masks that are there for another policy.
        """
        inserted = self._insert_masks(module)
        if self.kind != "gate" or gates_of(module):
            return inserted
        constraints = Constraints(include=self.include, exclude=self.exclude, allow_statistical=self.allow_statistical)
        chosen = eligible_orbits(module, find_orbits(module), constraints)
        return insert_gates(module, chosen, self._options()) or inserted

    def _options(self) -> GateOptions:
        return GateOptions(self.block, self.logits, self.initial, self.temperature, self.momentum)

    def _insert_masks(self, module: fx.GraphModule) -> bool:
        if has_masks(module):
            attention_of(module, self.attention)
            return False
        if hasattr(module, MASKS):
            raise UsageError(f"the model has an attribute '{MASKS}', where its masks would be; rename it")
        orbits = find_orbits(module, self.attention)
        owners = _maskable(orbits)
        sites = list(_sites(module, orbits, owners))
        if not sites:
            return False
        keep_attention(module, self.attention)
        writer = _Writer(module, orbits, owners)
        for site in sites:
            writer.insert(*site)
        return True


def _maskable(orbits: Orbits) -> Tensor:
    """Return int64 [classes], the orbit of each class, or -1 where there is none or it has but one class."""
    widths = torch.tensor([orbit.width for orbit in orbits] + [0])
    return torch.where(widths[orbits.of_class] > 1, orbits.of_class, -1)


def _sites(module: fx.GraphModule, orbits: Orbits, owners: Tensor) -> Iterator[tuple[fx.Node, fx.Node, int, Tensor]]:
    """Yield (absorbing node, its input, dimension, class of each channel), each once."""
    nodes = {node.name: node for node in module.graph.nodes}
    part = orbits.labelling.partition
    absorbed: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for event in orbits.labelling.flow.absorbed:
        absorbed[event.node, event.source].append(part.of_slot[event.label])
    for (node, source), classes in absorbed.items():
        value = orbits.labelling.values[source]
        assert isinstance(value, Labelled)
        here = torch.zeros(part.count, dtype=torch.bool)
        here[torch.cat(classes)] = True
        for dim, label in enumerate(value.labels):
            if label is None:
                continue
            held = part.of_slot[label]
            if ((owners[held] >= 0) & here[held]).any():
                yield nodes[node], nodes[source], dim, held


class _Writer:
    """Adds mask buffers and nodes to a graph."""

    def __init__(self, module: fx.GraphModule, orbits: Orbits, owners: Tensor) -> None:
        self.module = module
        self.owners = owners
        self.orbits = orbits
        self.masks = ChannelMasks()
        self.read: dict[str, fx.Node] = {}
        self.masked: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        module.add_module(MASKS, self.masks)
        self.position = torch.zeros(orbits.labelling.partition.count, dtype=torch.int64)
        for orbit in orbits:
            self.position[orbit.classes] = torch.arange(orbit.width)
        reference = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
        self.device, self.dtype = reference.device, reference.dtype

    def insert(self, node: fx.Node, source: fx.Node, dim: int, classes: Tensor) -> None:
        """Mask dimension `dim` of `source` where `node` reads it, behind the mask of another dimension."""
        original, source = source, self.masked.get((node, source), source)
        owner = self.owners[classes]
        involved = [self.orbits.orbits[i] for i in owner.unique().tolist() if i >= 0]
        index = self._index(classes, owner, involved)
        graph = self.module.graph
        with graph.inserting_before(node):
            masks = [self._mask(orbit) for orbit in involved]
            table = None if index is None else graph.get_attr(f"{MASKS}.{self._table(node, dim, index)}")
            arguments = (source, masks, dim) if table is None else (source, masks, dim, table)
            masked = graph.call_function(mask_channels, arguments)
        for key in ("val", "tensor_meta"):
            if key in source.meta:
                masked.meta[key] = source.meta[key]
        node.replace_input_with(source, masked)
        self.masked[node, original] = masked

    def _index(self, classes: Tensor, owner: Tensor, involved: list[Orbit]) -> Tensor | None:
        """Return where each channel's mask is in the joined masks; None when they are one mask in order."""
        end = sum(orbit.width for orbit in involved)
        offsets = torch.full((len(self.orbits) + 1,), end)
        start = 0
        for orbit in involved:
            offsets[int(self.orbits.of_class[orbit.classes[0]])] = start
            start += orbit.width
        index = torch.where(owner >= 0, offsets[owner] + self.position[classes], end)
        in_order = len(involved) == 1 and torch.equal(index, torch.arange(end))
        return None if in_order else index

    def _mask(self, orbit: Orbit) -> fx.Node:
        """Return the node that reads an orbit's mask, made where it is first needed."""
        if orbit.name not in self.read:
            mask = torch.ones(orbit.width, device=self.device, dtype=self.dtype)
            self.masks.register_buffer(orbit.name, mask)
            self.read[orbit.name] = self.module.graph.get_attr(f"{MASKS}.{orbit.name}")
        return self.read[orbit.name]

    def _table(self, node: fx.Node, dim: int, index: Tensor) -> str:
        name = f"channels_of_{node.name}_{dim}"
        while hasattr(self.masks, name):
            name += "_"
        self.masks.register_buffer(name, index.to(self.device))
        return name
