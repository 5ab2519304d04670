"""Networks for the tests of quantisation, and what makes graphs of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import fxprune
from fxprune.graph.passes import Pipeline
from fxprune.quantization import Range, Ranges, calibrate
from fxprune.runtime.int8.layer import Int8Layer
from passes import Conv1x1ToLinear, Quantization

__all__ = [
    *("Attention", "Calls", "InvertedResidual", "Mixed", "Mlp", "Residual"),
    *("call", "counts", "depthwise", "images", "layers", "quantised", "unit_ranges"),
]


class Calls(nn.Module):
    """Modules by name, and a function that calls them."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def call(function: Callable[..., Any], **modules: nn.Module) -> fx.GraphModule:
    """Return the graph of a function of [2, 6, 8] that calls modules."""
    torch.manual_seed(0)
    return fxprune.trace(Calls(function, **modules).eval().requires_grad_(False), torch.randn(2, 6, 8))


class Attention(nn.Module):
    """Queries, keys and values of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        heads = [layer(y).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        mixed = functional.scaled_dot_product_attention(*heads)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """What is in a transformer's block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.drop, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Dropout(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.drop(self.act(self.fc1(x))))


class Residual(nn.Module):
    """Linear layers with a value that floats and layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        y = y + functional.relu6(self.b(y))
        return self.c(y[:, ::2])


class Mixed(nn.Module):
    """Every kind of boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.mlp, self.residual = nn.Linear(8, 8), Attention(), Mlp(), Residual()
        self.act, self.over_tokens = nn.Hardswish(), nn.Linear(3, 5)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.residual(self.mlp(self.attention(x + x.mean(1, keepdim=True))))
        x = self.over_tokens(x.transpose(1, 2)).clamp(-0.5, 2.0)
        return self.head(x.flatten(1))


def depthwise(channels: int, kernel: int = 3, stride: int = 1, **options: Any) -> nn.Conv2d:
    """Return a depthwise convolution whose image keeps its size but for the stride."""
    padding = options.pop("padding", kernel // 2)
    return nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, **options)


class InvertedResidual(nn.Module):
    """A stem, and a block with a depthwise convolution, hard-swish and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, 2, 1), nn.Hardswish()
        self.expand, self.act_in = nn.Conv2d(8, 16, 1), nn.Hardswish()
        self.middle, self.drop, self.act_out = depthwise(16), nn.Dropout2d(), nn.Hardswish()
        self.project = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        middle = self.middle(self.act_in(self.expand(x)))
        return x + self.project(self.act_out(self.drop(middle)))


def images(model: nn.Module, x: Tensor, *im2col: str) -> fx.GraphModule:
    """Return the graph of a network of images, the convolutions that are linear layers turned into such."""
    graph = fxprune.trace(model.eval().requires_grad_(False), x)
    return Pipeline((Conv1x1ToLinear(im2col=im2col),))(graph).graph_module


def unit_ranges(module: fx.GraphModule) -> Ranges:
    """Return the same range for all values, whose text is the same on every machine."""
    return Ranges("given", {node.name: Range(-2.0, 1.984375) for node in module.graph.nodes})


def quantised(module: fx.GraphModule, *batches: Any, observer: str = "histogram", **options: Any) -> fx.GraphModule:
    """Calibrate a graph on batches, by default three drawn ones, and quantise it."""
    data = batches or [torch.randn(4, 6, 8) for _ in range(3)]
    ranges = calibrate(module, data, observer=observer)
    return Pipeline((Quantization(ranges=ranges, **options),))(module).graph_module


def counts(module: fx.GraphModule) -> tuple[int, int]:
    """Return how often a graph quantises and dequantises."""
    targets = [str(node.target) for node in module.graph.nodes]
    return targets.count("fxprune.quantize.default"), targets.count("fxprune.dequantize.default")


def layers(module: fx.GraphModule) -> dict[str, str]:
    """Return what the quantised layers of a graph give, and the activation that they compute, by path."""
    found = {path: part for path, part in module.named_modules() if isinstance(part, Int8Layer)}
    forms = {path: "f32" if part.target is None else "u8" for path, part in found.items()}
    return {path: " ".join(filter(None, (forms[path], part.activation))) for path, part in found.items()}
