"""Normalisation layers: affine parameters unite with the channels; sharing statistics makes channels statistical."""

from __future__ import annotations

from torch import Tensor

from fxprune.labels.call import Call, Rule, normalised, nothing
from fxprune.labels.flow import Label, Labels
from fxprune.labels.rules.pointwise import join

__all__ = ["RULES"]


def batch_norm(call: Call) -> list[Labels]:
    """Each channel (dimension 1) has its own statistics over all other dimensions."""
    x = call["input"]
    labels = list(call.labels(x))
    if isinstance(call["weight"], Tensor):
        call.flow.play(call.labels(call["weight"])[0], "scale")
    for d in (0, *range(2, x.dim())):
        _take_statistics(call, labels[d], x.numel() // (x.shape[1] * x.shape[d]))
    channel: Label = labels[1]
    affine = [t for t in call.tensors if t is not x]
    for tensor in affine:
        channel = call.flow.unite(channel, call.labels(tensor)[0])
    labels[1] = channel
    return [tuple(labels), *((channel,) if r.dim() == 1 and r.numel() else nothing(r) for r in call.result[1:])]


def _take_statistics(call: Call, label: Label, times: int) -> None:
    """State that statistics are taken over a dimension, `times` values at each position; PyTorch wants two at least.

    One class of every orbit stays, so a second one is pinned where each class gives a single value.
    """
    if label is None:
        return
    call.flow.mark_statistical(label, "batch statistics are taken over this dimension")
    if times == 1 and label.unique().numel() == label.numel():
        call.flow.pin(label[:1], "the statistics of a single value are not defined")


def layer_norm(call: Call) -> list[Labels]:
    """Statistics are taken over the trailing `normalized_shape` dimensions: labels there are statistical."""
    x, count = call["input"], len(call["normalized_shape"])
    labels = list(call.labels(x))
    for d in range(x.dim() - count, x.dim()):
        call.flow.mark_statistical(labels[d], "layer normalisation takes statistics over this dimension")
        for name in ("weight", "bias"):
            affine = call[name] if call.accepts(name) else None
            if isinstance(affine, Tensor) and affine.shape[d - x.dim()] > 1:
                labels[d] = call.flow.unite(labels[d], call.labels(affine)[d - x.dim()])
    out = tuple(labels)
    return [out, *(labels_of_statistics(out, count, r) for r in call.result[1:])]


def labels_of_statistics(labels: Labels, count: int, result: Tensor) -> Labels:
    """Labels of a mean or deviation: as the input before the normalised dimensions, which have size 1."""
    return (*labels[: len(labels) - count], *((None,) * (result.dim() - len(labels) + count)))


def group_norm(call: Call) -> list[Labels]:
    """Each group of channels has its own statistics: whole groups leave exactly, so the channels of one unite."""
    x, groups = call["input"], call["group"]
    labels = list(call.labels(x))
    label = labels[1]
    if label is not None and groups == 1:
        call.flow.mark_statistical(label, "group normalisation takes statistics over all channels")
    elif label is not None:
        call.flow.unite_rows(label.view(groups, -1))
    for name in ("weight", "bias"):
        if isinstance(call[name], Tensor):
            labels[1] = call.flow.unite(labels[1], call.labels(call[name])[0])
    for spatial in labels[2:]:
        call.flow.mark_statistical(spatial, "group normalisation takes statistics over this dimension")
    return [tuple(labels), *(nothing(r) for r in call.result[1:])]


def weight_norm(call: Call) -> list[Labels]:
    """Every position of dimension `dim` of a weight is divided by its norm over the others, and scaled."""
    v, g = call["v"], call["g"]
    dim = normalised(call["dim"], v.dim())
    labels = list(call.labels(v))
    for d, label in enumerate(labels):
        if d == dim:
            labels[d] = join(call.flow, [label, call.labels(g)[d]])
        else:
            call.flow.mark_statistical(label, "weight normalisation takes a norm over this dimension")
    return [tuple(labels), tuple(labels[d] if d == dim else None for d in range(call.result[1].dim()))]


RULES: dict[str, Rule] = {
    "aten.native_batch_norm": batch_norm,
    "aten._native_batch_norm_legit": batch_norm,
    "aten._native_batch_norm_legit_no_training": batch_norm,
    "aten._batch_norm_with_update": batch_norm,
    "aten._batch_norm_no_update": batch_norm,
    "aten.cudnn_batch_norm": batch_norm,
    "aten.native_layer_norm": layer_norm,
    "aten._fused_rms_norm": layer_norm,
    "aten.native_group_norm": group_norm,
    "aten._weight_norm_interface": weight_norm,
}
