"""Operators that split, merge and repeat dimensions; only those that touch a labelled dimension look inside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxprune.labels.call import Call, Rule, nothing
from fxprune.labels.flow import Label, Labels
from fxprune.labels.partition import components

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
        for label in labels:
            call.flow.pin(label, "reshaped without a single element")
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
        merged = _merge(call, [labels[d] for d in inner], [before[d] for d in inner], sources.start)
        for d, label in zip(outer, _split(call, merged, [after[d] for d in outer], targets.start), strict=True):
            out[d] = label
    return tuple(out)


def _merge(call: Call, labels: list[Label], sizes: list[int], dim: int) -> Tensor:
    """Merge adjacent dimensions from `dim` on, of which one keeps its label; that of others is pinned."""
    kept = _kept_of_merged(call, labels, sizes, dim)
    for d, label in enumerate(labels):
        if d != kept:
            call.flow.pin(label, "merged with another labelled dimension")
    shape = [size if d == kept else 1 for d, size in enumerate(sizes)]
    return _labelled(labels[kept]).view(shape).expand(sizes).reshape(-1)


def _kept_of_merged(call: Call, labels: list[Label], sizes: list[int], dim: int) -> int:
    """Choose which of merged dimensions keeps its label.

    1. Copies that an expansion made give way: repeated heads go by the heads, not by their copies.
    2. The widest keeps its label. A probe follows the outermost, since heads lie outside of their dimensions.
    """
    known = [d for d, label in enumerate(labels) if label is not None]
    if len(known) == 1:
        return known[0]
    lasting = [d for d in known if not call.flow.slots.is_fresh(_labelled(labels[d]))] or known
    best = lasting[0] if call.flow.is_probe else max(lasting, key=lambda d: sizes[d])
    return call.flow.choose((call.flow.step, "merge", dim), labels, best)


def _labelled(label: Label) -> Tensor:
    assert label is not None
    return label


def _split(call: Call, label: Tensor, sizes: list[int], dim: int) -> Labels:
    """Split a labelled dimension into several from `dim` on; return their labels.

    The axis that leaves the most classes keeps the label; the innermost (channel within a group, within a head) among
    equals. Where that unites nothing, as after a merge, the split is no choice; otherwise attention may want another.
    """
    if len(sizes) == 1:
        return (label,)
    table = label.view(sizes)
    ways = [table.movedim(d, 0).flatten(1) for d in range(len(sizes))]
    best = max(range(len(ways)), key=lambda d: (_classes(ways[d]), d))
    if not _is_constant(ways[best]):
        return call.flow.divide(dim, ways, best)
    return tuple(rows[:, 0] if d == best else None for d, rows in enumerate(ways))


def _is_constant(rows: Tensor) -> bool:
    """Whether each row is one slot again and again."""
    return torch.equal(rows, rows[:, :1].expand_as(rows))


def _classes(rows: Tensor) -> int:
    """Count the classes that remain when the slots of each row unite."""
    if _is_constant(rows):
        return int(rows[:, 0].unique().numel())
    slots, local = rows.unique(return_inverse=True)
    return int(
        components(slots.numel(), [(local[:, :1].expand_as(local).reshape(-1), local.reshape(-1))]).unique().numel()
    )


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


def channel_shuffle(call: Call) -> Labels:
    """[B, g·n, …] → [B, n·g, …]: the same channel leaves every group, so that there are still g of them."""
    labels = call.labels(call["self"])
    label = labels[1]
    if label is not None:
        columns = label.view(call["groups"], -1).t()
        call.flow.unite_rows(columns)
        label = columns.reshape(-1)
    return (labels[0], label, *labels[2:])


def im2col(call: Call) -> Labels:
    """`F.unfold`, [B, C, H, W] → [B, C·kh·kw, L]: each channel becomes the positions of its window."""
    *batch, label, height, width = call.labels(call["self"])
    for space in (height, width):
        call.flow.pin(space, "windows slide along this dimension")
    return (*batch, None if label is None else label.repeat_interleave(math.prod(call["kernel_size"])), None)


def col2im(call: Call) -> Labels:
    """`F.fold`, [B, C·kh·kw, L] → [B, C, H, W]: the positions of a channel's window leave together."""
    *batch, label, windows = call.labels(call["self"])
    call.flow.pin(windows, "windows are added up along this dimension")
    if label is not None:
        rows = label.view(-1, math.prod(call["kernel_size"]))
        call.flow.unite_rows(rows)
        label = rows[:, 0]
    return (*batch, label, None, None)


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
    **dict.fromkeys(["aten.channel_shuffle", "aten.native_channel_shuffle"], channel_shuffle),
    "aten.im2col": im2col,
    "aten.col2im": col2im,
    "aten.as_strided": as_strided,
}
