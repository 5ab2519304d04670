"""Operators that read every channel of a map at places that depend on data: channels pass, places are pinned."""

from __future__ import annotations

from torch import Tensor

from fxprune.labels.call import Call, Rule
from fxprune.labels.flow import Label, Labels
from fxprune.labels.rules.pointwise import broadcast, join

__all__ = ["RULES"]


def grid_sampler(call: Call) -> Labels:
    """[B, C, …] at a grid [B, …, 2 or 3] of places."""
    x, grid = call["input"], call["grid"]
    call.pin(x, "sampled at places of this dimension", 2)
    call.pin(grid, "places to sample at", 1)
    batch = join(call.flow, [call.labels(x)[0], call.labels(grid)[0]])
    return (batch, call.labels(x)[1], *(None for _ in x.shape[2:]))


def region_pooling(call: Call) -> Labels | list[Labels]:
    """`roi_align`, `roi_pool`: [B, C, H, W] in R boxes [R, 5] → [R, C, h, w]."""
    out = (None, _channels_in_boxes(call), None, None)
    return out if isinstance(call.result, Tensor) else [out for _ in call.result]


def position_sensitive_pooling(call: Call) -> list[Labels]:
    """`ps_roi_align`, `ps_roi_pool`: [B, C·h·w, H, W] in R boxes → [R, C, h, w]: a channel for each place in a box."""
    label = _channels_in_boxes(call)
    if label is not None:
        rows = label.view(call.result[0].shape[1], -1)
        call.flow.unite_rows(rows)
        label = rows[:, 0]
    return [(None, label, None, None) for _ in call.result]


def _channels_in_boxes(call: Call) -> Label:
    x = call["input"]
    batch, channels, *space = call.labels(x)
    for label in (batch, *space):
        call.flow.pin(label, "boxes lie in this dimension")
    call.pin(call["rois"], "boxes to pool in")
    return channels


def max_unpool(call: Call) -> Labels:
    """Every channel's maxima go back to where they were in their map, as `indices` say."""
    x, indices = call["self"], call["indices"]
    count = len(call["output_size"])
    for tensor in (x, indices):
        call.pin(tensor, "put back to places of this dimension", x.dim() - count)
    labels = broadcast(call.flow, [(t.shape, call.labels(t)) for t in (x, indices)])
    return (*labels[:-count], *(None for _ in range(count)))


RULES: dict[str, Rule] = {
    **dict.fromkeys(["aten.grid_sampler_2d", "aten.grid_sampler_3d"], grid_sampler),
    **dict.fromkeys(["torchvision.roi_align", "torchvision.roi_pool"], region_pooling),
    **dict.fromkeys(["torchvision.ps_roi_align", "torchvision.ps_roi_pool"], position_sensitive_pooling),
    **dict.fromkeys(["aten.max_unpool2d", "aten.max_unpool3d"], max_unpool),
}
