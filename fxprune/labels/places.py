"""Where the classes of a partition occur."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fxprune.labels.flow import TensorSlots
from fxprune.labels.propagation import Labelling
from fxprune.runtime.weight_masks import is_weight_mask

__all__ = ["Places", "distinct"]

_NONE = torch.zeros(0, dtype=torch.int64)


class Places:
    """Where the classes of a partition occur: dimensions of tensors, and label vectors of values."""

    def __init__(self, labelling: Labelling) -> None:
        self.labelling = labelling
        self.of_slot = labelling.partition.of_slot

    @cached_property
    def dimensions(self) -> list[tuple[TensorSlots, int, Tensor]]:
        """All (tensor, dimension, class of each position), but of empty dimensions and of weight masks.

        A weight mask has the classes of its weight, and says nothing of its own.
        """
        return [
            (tensor, dim, self.of_slot[start : start + size])
            for tensor in self.labelling.flow.slots.tensors
            for dim, (start, size) in enumerate(zip(tensor.starts, tensor.shape, strict=True))
            if size and not is_weight_mask(tensor.name)
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


def distinct(values: Tensor) -> set[int]:
    """Return the distinct values of a vector that mostly has one."""
    first = values[:1]
    return set(first.tolist()) if bool((values == first).all()) else set(values.unique().tolist())
