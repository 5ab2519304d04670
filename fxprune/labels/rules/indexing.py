"""Operators that read or write at given positions: those dimensions are pinned, the others unite.

Reading whole dimensions by a constant (`index_select`, `index`) is movement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.labels.call import Call, Rule, normalised
from fxprune.labels.flow import Label, Labels
from fxprune.labels.rules.pointwise import broadcast, join

__all__ = ["RULES"]


def gather(call: Call) -> Labels:
    """Read one position of dimension `dim` for every element of `index`, whose labels the result has."""
    dim = normalised(call["dim"], call["self"].dim())
    return _aligned(call, [call["index"], call["self"]], dim)


def scatter(call: Call) -> Labels:
    """Write, add or reduce elements of `src` to the positions of dimension `dim` that `index` says."""
    dim = normalised(call["dim"], call["self"].dim())
    operands = [call["self"], call["index"], *([call["src"]] if call.accepts("src") else [])]
    for tensor in operands:
        call.flow.pin(call.labels(tensor)[dim], "written at positions")
    return _aligned(call, operands, dim)


def _aligned(call: Call, tensors: list[Tensor], dim: int) -> Labels:
    """Unite the labels of tensors that are used element by element, `dim` aside; return those of the first.

    Operands do not broadcast: of a longer one only the first positions are used, so that these are pinned.
    """
    out: list[Label] = []
    for d, size in enumerate(tensors[0].shape):
        labels = [call.labels(t)[d] for t in tensors]
        if d == dim:
            for label in labels[1:]:
                call.flow.pin(label, "read or written at positions")
            out.append(labels[0])
        elif all(t.shape[d] == size for t in tensors):
            out.append(join(call.flow, labels))
        else:
            for label in labels:
                call.flow.pin(label, "read or written at its first positions")
            out.append(None)
    return tuple(out)


def along_index(call: Call) -> Labels:
    """`index_add`, `index_copy`: write the positions of a source to those of dimension `dim`; the others unite."""
    x, source = call["self"], call["source"]
    call.pin(call["index"], "positions that are written")
    dim = normalised(call["dim"], x.dim())
    labels = list(call.labels(x))
    for d, label in enumerate(call.labels(source)):
        if d == dim:
            call.flow.pin(labels[d], "written at positions")
            call.flow.pin(label, "written at positions")
            labels[d] = None
        else:
            labels[d] = join(call.flow, [labels[d], label])
    return tuple(labels)


def index_fill(call: Call) -> Labels:
    """Write one value to positions of dimension `dim`; the others pass."""
    labels = list(call.labels(call["self"]))
    dim = normalised(call["dim"], len(labels))
    call.pin(call["index"], "positions that are written")
    call.flow.pin(labels[dim], "written at positions")
    labels[dim] = None
    return tuple(labels)


def index_put(call: Call) -> Labels:
    """Write `values` at positions of some dimensions; dimensions after them unite with those of the values."""
    x, values = call["self"], call["values"]
    labels = list(call.labels(x))
    behind = _behind(call["indices"])
    for index in call["indices"]:
        if index is not None:
            call.pin(index, "positions that are written")
    first = max(values.dim() - (x.dim() - behind), 0)
    for label in (*labels[:behind], *call.labels(values)[:first]):
        call.flow.pin(label, "written at positions")
    trailing = [(x.shape[behind:], call.labels(x)[behind:]), (values.shape[first:], call.labels(values)[first:])]
    return (*(None for _ in range(behind)), *broadcast(call.flow, trailing))


def _behind(indices: Sequence[Any]) -> int:
    """Return the first dimension behind all indexed ones; a mask of booleans covers as many as it has."""
    return sum(i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1 for i in indices)


def slice_scatter(call: Call) -> Labels:
    """Write a source to a slice of dimension `dim`, whose labels unite with the source's; so do all others."""
    x, source, dim = call["self"], call["src"], normalised(call["dim"], call["self"].dim())
    label, written = call.labels(x)[dim], call.labels(source)[dim]
    if label is not None and call.may_reshape and call["step"] == 1:
        start, stop, _ = slice(call["start"], call["end"]).indices(x.shape[dim])
        join(call.flow, [label[start:stop], written])
    else:
        for each in (label, written):
            call.flow.pin(each, "written where positions cannot be re-derived")
    others = _joined_without(call, dim, call.labels(source)[:dim] + call.labels(source)[dim + 1 :])
    return (*others[:dim], label, *others[dim:])


def select_scatter(call: Call) -> Labels:
    """Write a source to one position of dimension `dim`, which must stay; the others unite."""
    x, dim = call["self"], normalised(call["dim"], call["self"].dim())
    label = call.labels(x)[dim]
    if label is not None:
        call.flow.pin(label[[call["index"]]] if call.may_reshape else label, "selected by its index")
    others = _joined_without(call, dim, call.labels(call["src"]))
    return (*others[:dim], label, *others[dim:])


def _joined_without(call: Call, dim: int, written: Labels) -> list[Label]:
    """Unite the labels of `self`, dimension `dim` aside, with those of what is written."""
    labels = call.labels(call["self"])
    return [join(call.flow, pair) for pair in zip(labels[:dim] + labels[dim + 1 :], written, strict=True)]


RULES: dict[str, Rule] = {
    "aten.gather": gather,
    **dict.fromkeys(["aten.scatter", "aten.scatter_add", "aten.scatter_reduce"], scatter),
    **dict.fromkeys(["aten.index_add", "aten.index_copy"], along_index),
    "aten.index_fill": index_fill,
    **dict.fromkeys(["aten.index_put", "aten._unsafe_index_put"], index_put),
    "aten.slice_scatter": slice_scatter,
    "aten.select_scatter": select_scatter,
}
