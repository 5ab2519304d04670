"""Operators that split, merge and repeat dimensions; only those that touch a labelled dimension look inside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxprune.labels.call import Call, Rule, nothing
from fxprune.labels.flow import Label, Labels

__all__ = ["RULES", "dimension_groups"]


def dimension_groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Factor a reshape into the smallest groups of dimensions with equal products.

    >>> [(list(a), list(b)) for a, b in dimension_groups((2, 12, 5), (2, 3, 4, 5))]
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j = i, j
        left = right = 1
        if i < len(before):
            left, i = left * before[i], i + 1
        if j < len(after):
            right, j = right * after[j], j + 1
        while left != right:
            if (left < right and i < len(before)) or j >= len(after):
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        yield range(start_i, i), range(start_j, j)


def reshape(call: Call) -> Labels:
    """View, reshape, flatten, squeeze, unsqueeze: split and merge dimensions in row-major order."""
    x = call.tensors[0]
    if call.accepts("dtype"):
        call.pin_all("viewed as another type")
        return nothing(call.result)
    return reshaped(call, x.shape, call.result.shape, call.labels(x))


def reshaped(call: Call, before: Sequence[int], after: Sequence[int], labels: Labels) -> Labels:
    """Return the labels of a row-major reshape."""
    out: list[Label] = [None] * len(after)
    if 0 in before:
        return tuple(out)
    for sources, targets in dimension_groups(before, after):
        inner = [d for d in sources if before[d] > 1]
        outer = [d for d in targets if after[d] > 1]
        if all(labels[d] is None for d in inner):
            continue
        if len(inner) == 1 and len(outer) == 1:
            out[outer[0]] = labels[inner[0]]
            continue
        if not call.may_reshape:
            for d in inner:
                call.flow.pin(labels[d], "reshaped inside a leaf module that is not known to follow its input")
            continue
        merged = _merge(call, [labels[d] for d in inner], [before[d] for d in inner])
        axis, label = _split(call, merged, [after[d] for d in outer])
        out[outer[axis]] = label
    return tuple(out)


def _merge(call: Call, labels: list[Label], sizes: list[int]) -> Tensor:
    """Merge adjacent dimensions of which one keeps its label; that of others is pinned."""
    widest = max((d for d in range(len(labels)) if labels[d] is not None), key=lambda d: sizes[d])
    for d, label in enumerate(labels):
        if d != widest:
            call.flow.pin(label, "merged with another labelled dimension")
    kept = labels[widest]
    assert kept is not None
    shape = [size if d == widest else 1 for d, size in enumerate(sizes)]
    return kept.view(shape).expand(sizes).reshape(-1)


def _split(call: Call, label: Tensor, sizes: list[int]) -> tuple[int, Label]:
    """Split a labelled dimension into several; return the one that keeps the label, and its label.

    The kept positions must stay a rectangle, so classes unite along all other dimensions. The dimension that leaves
    the most classes keeps its label; the innermost (channel within a group, within a head) among equals.
    """
    if len(sizes) == 1:
        return 0, label
    table = label.view(sizes)
    best, rows = max(
        ((d, table.movedim(d, 0).flatten(1)) for d in range(len(sizes))), key=lambda c: (_classes(c[1]), c[0])
    )
    call.flow.unite_rows(rows)
    return best, rows[:, 0]


def _classes(rows: Tensor) -> int:
    """Count the classes that remain when the slots of each row unite."""
    if torch.equal(rows, rows[:, :1].expand_as(rows)):
        return int(rows[:, 0].unique().numel())
    overlap = rows.numel() - rows.unique().numel()
    return max(rows.shape[0] - overlap, 1)


def expand(call: Call) -> Labels:
    """Repeat dimensions of size 1, whose copies are fresh slots, as many as are wanted; others pass."""
    x, out = call["self"], call.result
    new = out.dim() - x.dim()
    before = (1,) * new + tuple(x.shape)
    labels = (None,) * new + call.labels(x)
    return tuple(
        call.made(size) if old == 1 and size > 1 else label
        for label, old, size in zip(labels, before, out.shape, strict=True)
    )


def repeat(call: Call) -> Labels:
    """Tile dimensions: each copy of a position has its label; copies of the only position are fresh slots."""
    x, times = call["self"], call["repeats"]
    new = len(times) - x.dim()
    before, labels = (1,) * new + tuple(x.shape), (None,) * new + call.labels(x)

    def tiled(label: Label, size: int, n: int) -> Label:
        if size == 1 and n > 1:
            return call.made(n)
        return None if label is None else label.repeat(n)

    return tuple(tiled(*dimension) for dimension in zip(labels, before, times, strict=True))


def pixel_shuffle(call: Call) -> Labels:
    """[.., C·r², H, W] → [.., C, H·r, W·r]: the r² channels of one output channel leave together."""
    labels = _pin_space(call)
    label = labels[-3]
    if label is not None:
        rows = label.view(call.result.shape[-3], -1)
        call.flow.unite_rows(rows)
        label = rows[:, 0]
    return (*labels[:-3], label, None, None)


def pixel_unshuffle(call: Call) -> Labels:
    """[.., C, H·r, W·r] → [.., C·r², H, W]: each channel becomes r² that leave together."""
    labels = _pin_space(call)
    label = labels[-3]
    if label is not None:
        label = label.repeat_interleave(call["downscale_factor"] ** 2)
    return (*labels[:-3], label, None, None)


def _pin_space(call: Call) -> Labels:
    labels = call.labels(call["self"])
    for label in labels[-2:]:
        call.flow.pin(label, "positions of channels and space are exchanged")
    return labels


def as_strided(call: Call) -> Labels:
    """A view by strides: followed when it only adds or drops dimensions of size 1, pinned otherwise."""
    x, out = call["self"], call.result

    def steps(sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
        return [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size > 1]

    if steps(x.shape, x.stride()) == steps(call["size"], call["stride"]) and not call["storage_offset"]:
        return reshape(call)
    call.pin_all("viewed by explicit strides")
    return nothing(out)


RULES: dict[str, Rule] = {
    "aten.view": reshape,
    "aten._unsafe_view": reshape,
    "aten._reshape_alias": reshape,
    "aten.reshape": reshape,
    "aten.squeeze": reshape,
    "aten.unsqueeze": reshape,
    "aten.expand": expand,
    "aten.repeat": repeat,
    "aten.pixel_shuffle": pixel_shuffle,
    "aten.pixel_unshuffle": pixel_unshuffle,
    "aten.as_strided": as_strided,
}
