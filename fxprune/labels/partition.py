"""Which slots must leave together: connected components of all unions, and what is pinned or statistical."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.labels.flow import Flow, Reason

__all__ = ["Partition", "components", "partition"]


def components(count: int, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return for each of `count` slots the smallest slot of its connected component.

    A vectorised union-find: hook larger roots onto smaller ones, flatten all paths, repeat while an edge joins two.

    >>> components(5, [(torch.tensor([0, 3]), torch.tensor([2, 4]))]).tolist()
    [0, 1, 0, 3, 3]
    """
    root = np.arange(count)
    edges = list(pairs)
    if not edges:
        return torch.from_numpy(root)
    left = torch.cat([a for a, _ in edges]).numpy()
    right = torch.cat([b for _, b in edges]).numpy()
    while left.size:
        a, b = root[left], root[right]
        apart = a != b
        left, right, a, b = left[apart], right[apart], a[apart], b[apart]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(jumped := root[root], root):
            root = jumped
    return torch.from_numpy(root)


@dataclass(frozen=True)
class Partition:
    """The classes of slots: one class is one prunable channel.

    Attributes:
        of_slot: int64 [slots], the class of each slot; classes are numbered in order of their first slot.
        count: number of classes.
        pinned: int64 [classes], index into `pins` of the first pin of each class, or -1.
        statistical: int64 [classes], index into `statistics`, or -1.
    """

    of_slot: Tensor
    count: int
    pinned: Tensor
    statistical: Tensor
    pins: tuple[Reason, ...]
    statistics: tuple[Reason, ...]


def partition(flow: Flow) -> Partition:
    """Turn the facts of a propagation into classes."""
    roots = components(flow.slots.count, flow.unions)
    is_root = roots == torch.arange(flow.slots.count)
    of_slot = (is_root.cumsum(0) - 1)[roots]
    count = int(is_root.sum())
    return Partition(
        of_slot,
        count,
        _first_event(of_slot, count, [label for label, _ in flow.pins]),
        _first_event(of_slot, count, [label for label, _ in flow.statistics]),
        tuple(reason for _, reason in flow.pins),
        tuple(reason for _, reason in flow.statistics),
    )


def _first_event(of_slot: Tensor, count: int, labels: list[Tensor]) -> Tensor:
    """Return for each class the index of the first label that touches it, or -1."""
    first = torch.full((count,), len(labels))
    if labels:
        sizes = torch.tensor([label.numel() for label in labels])
        events = torch.arange(len(labels)).repeat_interleave(sizes)
        first.scatter_reduce_(0, of_slot[torch.cat(labels)], events, "amin")
    return torch.where(first == len(labels), -1, first)
