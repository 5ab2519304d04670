"""Small networks that the golden dumps are of."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import fxprune

__all__ = ["Concatenation", "Residual", "masked", "traced"]


class Residual(nn.Module):
    """Two coupled convolutions, a depthwise one, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.branch = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4 * 2 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.branch(self.depthwise(x))
        x = nn.functional.adaptive_avg_pool2d(x, 2)
        return self.head(x.view(-1, 16))


class Concatenation(nn.Module):
    """`cat(a, b) + c`, which no peer cuts, then `chunk` without sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 2, 1)
        self.b = nn.Conv2d(3, 4, 1)
        self.c = nn.Conv2d(3, 6, 1)
        self.left = nn.Conv2d(3, 5, 1)
        self.right = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), self.b(x)], 1) + self.c(x)
        left, right = y.chunk(2, dim=1)
        return self.left(left) + self.right(right)


def traced(model: nn.Module) -> fx.GraphModule:
    torch.manual_seed(0)
    return fxprune.trace(model.eval(), torch.zeros(2, 3, 4, 4))


def masked(model: nn.Module, **masks: list[int]) -> fx.GraphModule:
    """Return a masked graph; `masks` sets those of some orbits."""
    from fxprune.graph.passes import Pipeline
    from passes import MaskInsertion

    module = Pipeline((MaskInsertion(),))(traced(model)).graph_module
    for orbit, values in masks.items():
        module.get_buffer(f"channel_masks.{orbit}").copy_(torch.tensor(values))
    return module
