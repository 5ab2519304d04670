"""Operators that move positions: the same ATen operator is applied to the labels, so PyTorch is the specification.

Labels are kept one vector a dimension, so nothing is ever materialised over batch × tokens × channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxprune.labels.call import Call, Rule, normalised
from fxprune.labels.flow import Label, Labels
from fxprune.labels.rules.pointwise import broadcast

__all__ = ["RULES"]

_T = TypeVar("_T")


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
    """`slice`: with a step over channels, each block of that many leaves together, so that the step stays right.

    That needs a slice that takes the same position of every block; any other pins what it steps over.
    """
    x, step = call["self"], call["step"]
    dim, labels = normalised(call["dim"], x.dim()), call.labels(x)
    label = labels[dim]
    if step == 1 or label is None:
        return along(call)
    start, stop, _ = slice(call["start"], call["end"]).indices(label.numel())
    if not call.may_reshape or start >= step or stop < label.numel():
        call.flow.pin(label, "sliced with a step")
        return (*labels[:dim], None, *labels[dim + 1 :])
    whole = label.numel() // step * step
    call.flow.unite_rows(label[:whole].view(-1, step))
    call.flow.pin(label[whole:], "the last of a slice with a step")
    return (*labels[:dim], label[start::step], *labels[dim + 1 :])


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
    call.pin(call["index"], "positions that are read")
    call.flow.pin(labels[dim], "indexed by data")
    return (*labels[:dim], None, *labels[dim + 1 :])


def index(call: Call) -> Labels:
    """Advanced indexing: one constant 1-D index moves its dimension, anything else pins what it indexes."""
    x, indices = call["self"], list(call["indices"])
    labels = list(call.labels(x))
    indexed = [d for d, i in enumerate(indices) if i is not None]
    for d in indexed:
        call.pin(indices[d], "positions that are read")
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
    rest = broadcast(call.flow, [(_without(tuple(t.shape), dim), _without(call.labels(t), dim)) for t in tensors])
    return (*rest[:dim], joined, *rest[dim:])


def _whole(call: Call, label: Label, size: int) -> Tensor:
    if label is not None:
        return label
    fresh = call.flow.slots.fresh(size)
    call.flow.pin(fresh, "concatenated from a part that cannot be pruned")
    return fresh


def _without(values: tuple[_T, ...], dim: int) -> tuple[_T, ...]:
    return values[:dim] + values[dim + 1 :]


def stack(call: Call) -> Labels:
    """Join along a new dimension; all others unite."""
    dim = normalised(call["dim"], call.result.dim())
    rest = broadcast(call.flow, [(t.shape, call.labels(t)) for t in call["tensors"]])
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
    return _pinning(call, [normalised(d, x.dim()) for d in call["dims"]] or range(x.dim()), "rolled")


def rot90(call: Call) -> Labels:
    """Rotate the plane of two dimensions, which are pinned."""
    return _pinning(call, [normalised(d, call["self"].dim()) for d in call["dims"]], "rotated into another dimension")


def triangle(call: Call) -> Labels:
    """`tril`, `triu`: zeros in the last two dimensions by their positions, which are pinned."""
    ndim = call["self"].dim()
    return _pinning(call, (ndim - 2, ndim - 1), "zeroed by its position")


def _pinning(call: Call, dims: Iterable[int], text: str) -> Labels:
    """Pin some dimensions; the others pass."""
    labels = list(call.labels(call["self"]))
    for d in dims:
        call.flow.pin(labels[d], text)
        labels[d] = None
    return tuple(labels)


def diagonal(call: Call) -> Labels:
    """Two dimensions become their diagonal, the last of the result; they are pinned."""
    ndim = call["self"].dim()
    planes = {normalised(call["dim1"], ndim), normalised(call["dim2"], ndim)}
    labels = _pinning(call, planes, "a diagonal is taken of this dimension")
    return (*(label for d, label in enumerate(labels) if d not in planes), None)


def windows(call: Call) -> Labels:
    """`Tensor.unfold`: windows along a dimension, which is pinned; their positions are the last of the result."""
    dim = normalised(call["dimension"], call["self"].dim())
    return (*_pinning(call, [dim], "windows slide along this dimension"), None)


RULES: dict[str, Rule] = {
    "aten.permute": permute,
    "aten.transpose": transpose,
    "aten.t": transpose_last,
    "aten.slice": strided_slice,
    **dict.fromkeys(
        ["aten.split", "aten.split_with_sizes", "aten.unsafe_split", "aten.unsafe_split_with_sizes"], along
    ),
    "aten.select": select,
    "aten.unbind": unbind,
    "aten.index_select": index_select,
    "aten.index": index,
    "aten.cat": cat,
    "aten.stack": stack,
    "aten.constant_pad_nd": pad,
    "aten.flip": flip,
    "aten.roll": roll,
    "aten.rot90": rot90,
    **dict.fromkeys(["aten.tril", "aten.triu"], triangle),
    "aten.diagonal": diagonal,
    "aten.unfold": windows,
}
