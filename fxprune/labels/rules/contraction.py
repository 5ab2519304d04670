"""Operators that multiply and sum over a shared dimension: they absorb channels and make new ones.

`linear`, `matmul`, `einsum` and scaled dot-product attention reach these rules as `addmm` and `bmm`: on meta tensors
PyTorch decomposes them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxprune.labels.call import Call, Rule
from fxprune.labels.flow import Label, Labels
from fxprune.labels.rules.pointwise import broadcast, join

__all__ = ["RULES"]


def convolution(call: Call) -> Labels:
    """Convolution, transposed or not, in 1 to 3 dimensions.

    1. groups = 1: input channels unite with the weight's, output channels are the weight's.
    2. Whole groups leave (depthwise, many small groups): all channels of a group unite, input and output side.
    3. The same channel leaves every group (few large groups): channels unite across groups.

    Between 2 and 3 the one with more classes is taken.
    """
    weight, transposed = call["weight"], call["transposed"]
    lx, lw = call.labels(call["input"]), call.labels(weight)
    sizes = call["input"].shape[2:] if transposed else call.result.shape[2:]
    space = tuple(_slid(call, d) for d in range(len(sizes)))
    call.flow.count_macs(
        math.prod(weight.shape[2:]),
        (lx[0], call["input"].shape[0]),
        *zip(space, sizes, strict=True),
        (lw[0], weight.shape[0]),
        (lw[1], weight.shape[1]),
    )
    return (lx[0], _convolved(call, transposed), *space)


def deformable_convolution(call: Call) -> Labels:
    """A convolution that reads at offsets made from data, [B, 2·taps·offset groups, …], all of which stay.

    Its MACs are not counted: `torch.utils.flop_counter` does not count them either.
    """
    for tensor in (call["offset"], call["mask"]):
        call.pin(tensor, "offsets and weights of the taps of a deformable convolution")
    if call["offset_groups"] > 1:
        call.flow.pin(call.labels(call["input"])[1], "divided into groups of other offsets")
    call.pin(call["input"], "a convolution slides along this dimension", 2)
    return (call.labels(call["input"])[0], _convolved(call, transposed=False), None, None)


def _slid(call: Call, d: int) -> Label:
    """Return the label of spatial dimension d of a convolution's result: a kernel of one tap in place keeps it."""
    label = call.labels(call["input"])[2 + d]
    steps = [call[name][min(d, len(call[name]) - 1)] for name in ("stride", "padding", "output_padding")]
    if call["weight"].shape[2 + d] == 1 and steps == [1, 0, 0]:
        return label
    call.flow.pin(label, "a convolution slides along this dimension")
    return None


def _convolved(call: Call, transposed: bool) -> Label:
    """State what a convolution does to channels; return the label of its output channels."""
    x, weight, groups = call["input"], call["weight"], call["groups"]
    lw = call.labels(weight)
    call.pin(weight, "kernel taps of a convolution", 2)
    call.flow.play(lw[1 if transposed else 0], "output")
    call.flow.play(lw[0 if transposed else 1], "input")
    if groups == 1:
        call.contract((x, 1), (weight, 0 if transposed else 1))
        out = lw[1] if transposed else lw[0]
    else:
        out = _grouped(call, x, weight, groups, transposed)
    if call["bias"] is not None:
        out = call.flow.unite(out, call.labels(call["bias"])[0])
    return out


def _grouped(call: Call, x: Tensor, weight: Tensor, groups: int, transposed: bool) -> Label:
    flow = call.flow
    in_channels = call.labels(x)[1]
    rows, columns = call.labels(weight)[:2]
    inputs = x.shape[1] // groups
    outputs = call.result.shape[1] // groups
    if in_channels is not None and rows is not None and groups >= max(inputs, outputs):
        # 2. rows are [groups × outputs], or [groups × inputs] when transposed.
        flow.pin(columns, "channels within a group whose whole groups are pruned")
        members = torch.cat([in_channels.view(groups, inputs), rows.view(groups, -1)], 1)
        flow.unite_rows(members)
        return in_channels.view(groups, inputs)[:, :1].expand(-1, outputs).reshape(-1) if transposed else rows
    # 3. the first group stands for all.
    first = _across_groups(call, in_channels, groups)
    row = _across_groups(call, rows, groups)
    if in_channels is not None and (row if transposed else columns) is not None:
        call.absorb(x, 1)
    flow.unite(first, row if transposed else columns)
    if not transposed:
        return rows
    return None if columns is None else columns.repeat(groups)


def _across_groups(call: Call, label: Label, groups: int) -> Label:
    if label is None:
        return None
    table = label.view(groups, -1)
    call.flow.unite_rows(table.t())
    return table[0]


def mm(call: Call) -> Labels:
    """`mm` and `bmm`: [.., m, k] × [.., k, n]."""
    return _product(call, call["self"], call["mat2"])


def addmm(call: Call) -> Labels:
    """`addmm`: `mm` plus an operand that broadcasts to the result."""
    return _plus_self(call, _product(call, call["mat1"], call["mat2"]))


def baddbmm(call: Call) -> Labels:
    """`baddbmm`: `bmm` plus an operand that broadcasts to the result."""
    return _plus_self(call, _product(call, call["batch1"], call["batch2"]))


def _product(call: Call, a: Tensor, b: Tensor) -> Labels:
    la, lb = call.labels(a), call.labels(b)
    if call.varies(a) and call.varies(b):
        call.flow.products.append((la, lb))
    call.contract((a, a.dim() - 1), (b, b.dim() - 2))
    call.flow.play(lb[-1], "output")
    call.flow.play(lb[-2], "input")
    batch = tuple(join(call.flow, pair) for pair in zip(la[:-2], lb[:-2], strict=True))
    call.flow.count_macs(
        1, *zip(batch, a.shape[:-2], strict=True), *zip(la[-2:], a.shape[-2:], strict=True), (lb[-1], b.shape[-1])
    )
    return (*batch, la[-2], lb[-1])


def _plus_self(call: Call, out: Labels) -> Labels:
    added = call["self"]
    return broadcast(call.flow, [(call.result.shape, out), (added.shape, call.labels(added))])


def addbmm(call: Call) -> Labels:
    """`addbmm`: the sum of all products of a batch, plus an operand.

    Its MACs are not counted: `torch.utils.flop_counter` does not count them either.
    """
    a, b = call["batch1"], call["batch2"]
    call.contract((a, 2), (b, 1))
    call.contract((a, 0), (b, 0))
    return _plus_self(call, (call.labels(a)[1], call.labels(b)[2]))


def addmv(call: Call) -> Labels:
    """`addmv`: a matrix times a vector, plus an operand; see `vector_product`."""
    call.contract((call["mat"], 1), (call["vec"], 0))
    return _plus_self(call, call.labels(call["mat"])[:1])


def addr(call: Call) -> Labels:
    """`addr`: the outer product of two vectors, plus an operand."""
    return _plus_self(call, (*call.labels(call["vec1"]), *call.labels(call["vec2"])))


def vector_product(call: Call) -> Labels:
    """`mv` and `dot`: the last dimension of the first operand times the only one of the second.

    Their MACs are not counted: `torch.utils.flop_counter` does not count them either.
    """
    a, b = call.tensors
    call.contract((a, a.dim() - 1), (b, 0))
    return call.labels(a)[:-1]


def embedding(call: Call) -> Labels:
    """Row look-up: rows stay, every index is looked up alone, and the embedding's width is made here."""
    rows, width = call.labels(call["weight"])
    call.flow.pin(rows, "rows of an embedding are looked up by index")
    return (*call.labels(call["indices"]), width)


RULES: dict[str, Rule] = {
    "aten.convolution": convolution,
    "torchvision.deform_conv2d": deformable_convolution,
    "aten.mm": mm,
    "aten.bmm": mm,
    "aten.addmm": addmm,
    "aten.baddbmm": baddbmm,
    "aten.addbmm": addbmm,
    "aten.addmv": addmv,
    "aten.addr": addr,
    "aten.mv": vector_product,
    "aten.dot": vector_product,
    "aten.embedding": embedding,
}
