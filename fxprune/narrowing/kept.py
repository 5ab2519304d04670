"""Which positions of every tensor stay, read from the masks of a masked graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.errors import PlanError
from fxprune.labels.flow import Label, Labelled, TensorSlots
from fxprune.labels.orbits import Orbits
from fxprune.runtime.masks import mask_values

__all__ = ["Kept", "kept_classes"]


def kept_classes(module: fx.GraphModule, orbits: Orbits) -> Tensor:
    """Return bool [classes], False where a mask of the graph is zero.

    Raises `PlanError` when a mask removes a whole orbit.
    """
    kept = torch.ones(orbits.labelling.partition.count, dtype=torch.bool)
    for orbit in orbits:
        if orbit.mask is None:
            continue
        mask = mask_values(module, orbit.mask).cpu() != 0
        if not mask.any():
            raise PlanError(
                f"the mask of {orbit.name} removes all {orbit.width} channels of {', '.join(orbit.layers)}; "
                "keep at least one"
            )
        kept[orbit.classes] = mask
    return kept


class Kept:
    """Sizes and positions after the cut, for tensors with slots and for values of nodes."""

    def __init__(self, orbits: Orbits, classes: Tensor) -> None:
        self.labelling = orbits.labelling
        self._slots = classes[orbits.labelling.partition.of_slot]
        self._of_label: dict[int, tuple[Tensor | None, int]] = {}

    def is_repeated(self, label: Tensor) -> bool:
        """Whether positions of a label are kept or removed together, as those of channels merged with a batch are."""
        classes = self.labelling.partition.of_slot[label]
        return classes.unique().numel() < classes.numel()

    def of_label(self, label: Label) -> Tensor | None:
        """Return bool [positions], or None where all stay."""
        return None if label is None else self._look_up(label)[0]

    def _look_up(self, label: Tensor) -> tuple[Tensor | None, int]:
        """Return which positions of a label stay, None for all, and how many."""
        known = self._of_label.get(id(label))
        if known is None:
            mask = self._slots[label]
            count = int(mask.sum())
            known = self._of_label[id(label)] = (None if count == label.numel() else mask, count)
        return known

    def of_tensor(self, tensor: TensorSlots) -> list[Tensor | None]:
        """Return for each dimension of a parameter or buffer the positions int64 that stay, None for all."""
        rows: list[Tensor | None] = []
        for start, size in zip(tensor.starts, tensor.shape, strict=True):
            kept = self._slots[start : start + size]
            rows.append(None if bool(kept.all()) else kept.nonzero().squeeze(1))
        return rows

    def shape(self, value: Labelled) -> tuple[int, ...]:
        """Return the predicted shape of a value."""
        return tuple(
            size if label is None else self._look_up(label)[1]
            for size, label in zip(value.shape, value.labels, strict=True)
        )

    def value(self, node: str) -> Any:
        """Return the value of a node before the cut, tensors as `Labelled`."""
        return self.labelling.values[node]

    def shapes(self, node: str) -> list[tuple[int, ...]]:
        """Return the predicted shapes of all tensors in a node's value."""
        value = self.value(node)
        if isinstance(value, Labelled):
            return [self.shape(value)]
        leaves = pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, Labelled))
        return [self.shape(leaf) for leaf in leaves if isinstance(leaf, Labelled)]
