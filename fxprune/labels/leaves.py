"""Leaf modules with a rule of their own: what they compute depends on data, so their operators cannot be seen.

`LEAF_RULES` maps a module type, by its full name, to a rule. Any other leaf that does not run on meta tensors pins
what it holds and takes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fxprune.labels.flow import Flow, Label, Labels

__all__ = ["LEAF_RULES", "LeafRule", "find_leaf_rule"]

LeafRule = Callable[[Flow, list[tuple[Tensor, Labels]], Tensor], Labels]
"""States facts about the tensors that a leaf takes, and returns the labels of the one that it gives."""


def crops_of_maps(flow: Flow, inputs: list[tuple[Tensor, Labels]], result: Tensor) -> Labels:
    """[N, C, H, W] of every level → [boxes, C, h, w]: the levels' channels unite."""
    channels: list[Label] = [labels[1] for tensor, labels in inputs if tensor.dim() == 4]
    joined = channels[0]
    for other in channels[1:]:
        if joined is not None or other is not None:
            joined = flow.unite(joined, other)
    return (None, joined, *(None for _ in result.shape[2:]))


LEAF_RULES: dict[str, LeafRule] = {
    "torchvision.ops.poolers.MultiScaleRoIAlign": crops_of_maps,
}


def find_leaf_rule(module: nn.Module) -> LeafRule | None:
    """Return the rule of a leaf module, None where there is none.

    >>> find_leaf_rule(nn.LSTM(2, 2)) is None
    True
    """
    kind = type(module)
    return LEAF_RULES.get(f"{kind.__module__}.{kind.__qualname__}")
