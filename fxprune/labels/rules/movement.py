"""Operators that move positions: the same ATen operator is applied to the labels, so PyTorch is the specification.

Labels are kept one vector a dimension, so nothing is ever materialised over batch × tokens × channels; only a reshape
that splits or merges a labelled dimension looks inside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fxprune.labels.call import Call, Rule, normalised, nothing
from fxprune.labels.flow import Label, Labels
from fxprune.labels.rules.pointwise import broadcast

__all__ = ["RULES", "dimension_groups", "reshape"]


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


def permute(call: Call) -> Labels:
    """Reorder dimensions."""
    labels = call.labels(call["self"])
    return tuple(labels[normalised(d, len(labels))] for d in call["dims"])


def transpose(call: Call) -> Labels:
    """Swap two dimensions."""
    labels = list(call.labels(call["self"]))
    a, b = call["dim0"], call["dim1"]
    labels[a], labels[b] = labels[b], labels[a]
    return tuple(labels)


def transpose_last(call: Call) -> Labels:
    """`t`: swap the dimensions of a matrix."""
    return call.labels(call["self"])[::-1]


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


def along(call: Call) -> Labels | list[Labels]:
    """Operators that act on their dimension `dim` alone (`slice`, `split`, `index_select` …)."""
    x = call["self"]
    labels = call.labels(x)
    dim = normalised(call["dim"], x.dim())
    label = labels[dim]
    results = [call.result] if isinstance(call.result, Tensor) else list(call.result)
    moved: list[Label] = [None for _ in results]
    if label is not None and call.may_reshape:
        moved = [*_same_operator(call, label, dim)]
    elif label is not None:
        call.flow.pin(label, "divided inside a leaf module that is not known to follow its input")
    kept = [(*labels[:dim], m, *labels[dim + 1 :]) for m in moved]
    return kept[0] if isinstance(call.result, Tensor) else kept


def _same_operator(call: Call, label: Tensor, dim: int) -> list[Tensor]:
    """Apply the operator itself to a label, laid along dimension `dim` of a tensor that is 1 elsewhere."""
    x = call["self"]
    shape = [1] * x.dim()
    shape[dim] = label.numel()
    args = tuple(label.view(shape) if a is x else _real(call, a) for a in call.args)
    moved = call.operator(*args, **{k: _real(call, v) for k, v in call.kwargs.items()})
    return [m.reshape(-1) for m in ([moved] if isinstance(moved, Tensor) else moved)]


def _real(call: Call, value: Any) -> Any:
    return call.constant(value) if isinstance(value, Tensor) else value


def strided_slice(call: Call) -> Labels | list[Labels]:
    """`slice`: a step over channels is pinned, since no step keeps the same channels once some are gone."""
    x = call["self"]
    dim = normalised(call["dim"], x.dim())
    if call["step"] == 1:
        return along(call)
    labels = call.labels(x)
    call.flow.pin(labels[dim], "sliced with a step")
    return (*labels[:dim], None, *labels[dim + 1 :])


def select(call: Call) -> Labels:
    """Take one position of a dimension: that position must stay, and its index is re-derived."""
    x = call["self"]
    dim, labels = normalised(call["dim"], x.dim()), call.labels(x)
    label = labels[dim]
    if label is not None:
        chosen = label if not call.may_reshape else label[[call["index"]]]
        call.flow.pin(chosen, "selected by its index")
    return labels[:dim] + labels[dim + 1 :]


def unbind(call: Call) -> list[Labels]:
    """Split a dimension into its positions, all of which must stay."""
    x = call["self"]
    dim, labels = normalised(call["dim"], x.dim()), call.labels(x)
    call.flow.pin(labels[dim], "unbound into its positions")
    return [labels[:dim] + labels[dim + 1 :] for _ in call.result]


def index_select(call: Call) -> Labels | list[Labels]:
    """Take constant positions of a dimension; positions that depend on data pin it."""
    x = call["self"]
    dim, labels = normalised(call["dim"], x.dim()), call.labels(x)
    if call.constant(call["index"]) is not None:
        return along(call)
    call.flow.pin(labels[dim], "indexed by data")
    return (*labels[:dim], None, *labels[dim + 1 :])


def index(call: Call) -> Labels:
    """Advanced indexing: one constant 1-D index moves its dimension, anything else pins what it indexes."""
    x, indices = call["self"], list(call["indices"])
    labels = list(call.labels(x))
    indexed = [d for d, i in enumerate(indices) if i is not None]
    if len(indexed) == 1 and indices[indexed[0]].dim() == 1:
        d = indexed[0]
        positions = call.constant(indices[d])
        label = labels[d]
        if label is None:
            return tuple(labels)
        if positions is not None and call.may_reshape:
            return (*labels[:d], label[positions], *labels[d + 1 :])
    for d in indexed:
        call.flow.pin(labels[d], "indexed by several indices or by data")
    kept = [label for d, label in enumerate(labels) if d not in indexed]
    contiguous = all(b - a == 1 for a, b in pairwise(indexed))
    front = indexed[0] if contiguous else 0
    new = call.result.dim() - len(kept)
    return (*kept[:front], *(None for _ in range(new)), *kept[front:])


def cat(call: Call) -> Labels:
    """Concatenate along one dimension; the others unite."""
    tensors = [t for t in call["tensors"] if t.dim() > 1 or t.numel()]
    dim = normalised(call["dim"], call.result.dim())
    parts = [call.labels(t)[dim] for t in tensors]
    joined: Label = None
    if any(part is not None for part in parts):
        # A part of which nothing can be pruned gets slots of its own, pinned, so that the others stay free.
        joined = torch.cat([_whole(call, part, t.shape[dim]) for part, t in zip(parts, tensors, strict=True)])
    others = [(t.select(dim, 0), _without(call.labels(t), dim)) for t in tensors]
    rest = broadcast(call.flow, others) if call.result.dim() > 1 else ()
    return (*rest[:dim], joined, *rest[dim:])


def _whole(call: Call, label: Label, size: int) -> Tensor:
    if label is not None:
        return label
    fresh = call.flow.slots.fresh(size)
    call.flow.pin(fresh, "concatenated from a part that cannot be pruned")
    return fresh


def _without(labels: Labels, dim: int) -> Labels:
    return labels[:dim] + labels[dim + 1 :]


def stack(call: Call) -> Labels:
    """Join along a new dimension; all others unite."""
    dim = normalised(call["dim"], call.result.dim())
    rest = broadcast(call.flow, [(t, call.labels(t)) for t in call["tensors"]])
    return (*rest[:dim], None, *rest[dim:])


def pad(call: Call) -> Labels:
    """Constant padding: positions padded to a labelled dimension are fresh slots, and the amounts are re-derived."""
    x, amounts = call["self"], call["pad"]
    labels = list(call.labels(x))
    for back in range(len(amounts) // 2):
        d = x.dim() - 1 - back
        low, high = amounts[2 * back], amounts[2 * back + 1]
        label = labels[d]
        if label is None or (low == 0 and high == 0):
            continue
        if low < 0 or high < 0 or not call.may_reshape:
            call.flow.pin(label, "cropped or padded where the amount cannot be re-derived")
            labels[d] = None
            continue
        fresh = call.flow.slots.fresh
        labels[d] = torch.cat([fresh(low), label, fresh(high)])
    return tuple(labels)


def flip(call: Call) -> Labels:
    """Reverse dimensions."""
    x = call["self"]
    dims = {normalised(d, x.dim()) for d in call["dims"]}
    return tuple(label.flip(0) if label is not None and d in dims else label for d, label in enumerate(call.labels(x)))


def roll(call: Call) -> Labels:
    """Rotate dimensions; a rolled labelled dimension pins, as its shift depends on what is kept."""
    x = call["self"]
    labels = list(call.labels(x))
    dims = [normalised(d, x.dim()) for d in call["dims"]] or list(range(x.dim()))
    for d in dims:
        call.flow.pin(labels[d], "rolled")
        labels[d] = None
    return tuple(labels)


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
    "aten.permute": permute,
    "aten.transpose": transpose,
    "aten.t": transpose_last,
    "aten.expand": expand,
    "aten.slice": strided_slice,
    "aten.split": along,
    "aten.split_with_sizes": along,
    "aten.select": select,
    "aten.unbind": unbind,
    "aten.index_select": index_select,
    "aten.index": index,
    "aten.cat": cat,
    "aten.stack": stack,
    "aten.constant_pad_nd": pad,
    "aten.flip": flip,
    "aten.roll": roll,
    "aten.repeat": repeat,
    "aten.pixel_shuffle": pixel_shuffle,
    "aten.pixel_unshuffle": pixel_unshuffle,
    "aten.as_strided": as_strided,
}
