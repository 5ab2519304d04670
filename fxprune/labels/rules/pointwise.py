"""Operators that treat every position alone: the labels of the operands unite, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxprune.labels.call import Call, Rule
from fxprune.labels.flow import Flow, Label, Labels

__all__ = ["RULES", "broadcast", "join", "pointwise"]


def join(flow: Flow, labels: Sequence[Label]) -> Label:
    """Unite the labels of equally long dimensions; one of which nothing can be pruned holds all others."""
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        for label in known:
            flow.pin(label, "joined with a dimension that cannot be pruned")
        return None
    for other in known[1:]:
        flow.unite(known[0], other)
    return known[0]


def broadcast(flow: Flow, operands: Sequence[tuple[Sequence[int], Labels]]) -> Labels:
    """Unite the labels of operands, given by their shapes, that are broadcast together, position by position."""
    out: list[Label] = []
    for back in range(max(len(shape) for shape, _ in operands), 0, -1):
        present = [(shape[-back], labels[-back]) for shape, labels in operands if len(shape) >= back]
        # An operand of size 1 is repeated along the dimension, not joined with it.
        size = max(size for size, _ in present)
        out.append(join(flow, [label for length, label in present if length == size]))
    return tuple(out)


def pointwise(call: Call) -> Labels | list[Labels]:
    """Unite the operands; every result has the united labels."""
    labels = broadcast(call.flow, [(t.shape, call.labels(t)) for t in call.tensors])
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


def bucketed(call: Call) -> Labels:
    """`bucketize`: every position alone is looked up among boundaries, which must all stay."""
    for label in call.labels(call["boundaries"]):
        call.flow.pin(label, "boundaries that values are looked up among")
    return call.labels(call["self"])


RULES: dict[str, Rule] = {
    # PyTorch tags most pointwise operators itself (torch.Tag.pointwise); these it does not, in one version or another.
    **dict.fromkeys(
        [
            *("aten.clone", "aten.detach", "aten.alias", "aten.lift", "aten.lift_fresh", "aten.lift_fresh_copy"),
            *("aten._to_copy", "aten.copy", "aten._conj", "aten._neg_view", "aten.resolve_conj", "aten.resolve_neg"),
            *("aten.complex", "aten.polar", "aten.floor_divide", "aten.rsub", "aten.lerp", "aten.masked_fill"),
            *("aten.native_dropout", "aten.hardswish", "aten.leaky_relu", "aten._prelu_kernel"),
            *("aten.log_sigmoid_forward", "aten.rrelu_with_noise"),
        ],
        pointwise,
    ),
    "aten.glu": gated,
    "aten.bucketize": bucketed,
    **dict.fromkeys(
        [
            *("aten.zeros_like", "aten.ones_like", "aten.empty_like", "aten.full_like", "aten.zero", "aten.fill"),
            *("aten.rand_like", "aten.randn_like", "aten.randint_like", "aten.bernoulli", "aten.normal_"),
            *("aten.uniform_", "aten.exponential_"),
        ],
        like_first,
    ),
}
