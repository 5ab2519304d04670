"""Operators that treat every position alone: the labels of the operands unite, with broadcasting."""

from __future__ import annotations

from torch import Tensor

from fxprune.labels.call import Call, Rule
from fxprune.labels.flow import Flow, Label, Labels

__all__ = ["RULES", "broadcast", "pointwise"]


def broadcast(flow: Flow, operands: list[tuple[Tensor, Labels]]) -> Labels:
    """Unite the labels of operands that are broadcast together, position by position."""
    ndim = max(tensor.dim() for tensor, _ in operands)
    out: list[Label] = []
    for back in range(ndim, 0, -1):
        present = [(t.shape[-back], labels[-back]) for t, labels in operands if t.dim() >= back]
        # An operand of size 1 is repeated along the dimension, not joined with it.
        size = max(size for size, _ in present)
        joined = [label for length, label in present if length == size]
        label = joined[0]
        for other in joined[1:]:
            label = flow.unite(label, other) if not (label is None and other is None) else None
        if label is None:
            for other in joined:
                flow.pin(other, "joined with a dimension that cannot be pruned")
        out.append(label)
    return tuple(out)


def pointwise(call: Call) -> Labels | list[Labels]:
    """Unite the operands; every result has the united labels."""
    labels = broadcast(call.flow, [(t, call.labels(t)) for t in call.tensors])
    if isinstance(call.result, Tensor):
        return labels
    return [labels for _ in call.result]


def gated(call: Call) -> Labels:
    """`glu`: the first half of a dimension times the sigmoid of the second, so the halves unite."""
    x = call["self"]
    labels = list(call.labels(x))
    label = labels[call["dim"]]
    if label is not None:
        halves = label.view(2, -1)
        labels[call["dim"]] = call.flow.unite(halves[0], halves[1])
    return tuple(labels)


def like_first(call: Call) -> Labels:
    """The result has the labels of the first argument, whose values do not matter (`zeros_like`, `bernoulli`)."""
    return call.labels(call.tensors[0])


RULES: dict[str, Rule] = {
    # PyTorch tags most pointwise operators itself (torch.Tag.pointwise); these it does not.
    "aten.clone": pointwise,
    "aten.detach": pointwise,
    "aten.alias": pointwise,
    "aten.lift_fresh": pointwise,
    "aten.lift_fresh_copy": pointwise,
    "aten._to_copy": pointwise,
    "aten.copy": pointwise,
    "aten.native_dropout": pointwise,
    "aten.masked_fill": pointwise,
    "aten.hardswish": pointwise,
    "aten.leaky_relu": pointwise,
    "aten.rsub": pointwise,
    "aten._prelu_kernel": pointwise,
    "aten.log_sigmoid_forward": pointwise,
    "aten.rrelu_with_noise": pointwise,
    "aten.glu": gated,
    "aten.zeros_like": like_first,
    "aten.ones_like": like_first,
    "aten.empty_like": like_first,
    "aten.full_like": like_first,
    "aten.rand_like": like_first,
    "aten.randn_like": like_first,
    "aten.bernoulli": like_first,
    "aten.zero": like_first,
    "aten.fill": like_first,
    "aten.normal_": like_first,
    "aten.uniform_": like_first,
}
