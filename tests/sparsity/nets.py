"""Small networks whose weights get sparse, and what a reader of tensors counts in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxprune.graph.inputs import Inputs
from fxprune.runtime.weight_masks import masked_weights


class Bottleneck(nn.Module):
    """1×1, depthwise, 1×1 with a shortcut; a pooled linear head. 6 input channels are no multiple of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.expand = nn.Conv2d(6, 20, 1, bias=False)
        self.norm = nn.BatchNorm2d(20)
        self.depthwise = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.project = nn.Conv2d(20, 6, 1)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.project(torch.relu(self.depthwise(torch.relu(self.norm(self.expand(x))))))
        return self.head(x.mean((2, 3)))


class Kinds(nn.Module):
    """Every kind of convolution, a linear layer on tokens, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 16, 1, groups=2)
        self.twice = nn.Linear(16, 16)
        self.up = nn.ConvTranspose1d(16, 8, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(torch.relu(self.line(x))).transpose(1, 2)
        return self.up(self.twice(torch.relu(self.twice(x))).transpose(1, 2))


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(self.embedding(tokens))))


class Renamed(nn.Module):
    """A weight that another module holds under a name of its own and hands to a function."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(8, 8, bias=False)
        self.reader = Reader(layer.weight)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(torch.relu(self.layer(x)))


class Reader(nn.Module):
    """`F.linear` with a parameter of its own."""

    def __init__(self, matrix: nn.Parameter) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix)


class Standardised(nn.Conv2d):
    """A convolution that computes with another weight than it holds, as those of NF-Nets."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Padded(nn.Conv2d):
    """A convolution with a forward of its own that uses its weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(nn.functional.pad(x, (1, 1)), self.weight, self.bias)


def image() -> Tensor:
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def count_macs(module: nn.Module, example_inputs: Tensor) -> int:
    """Count the multiply-accumulates of a run from the weights that are not zero and the positions they are used at."""
    total = 0

    def count(layer: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal total
        kept = int(layer.weight.count_nonzero())  # type: ignore[operator]
        if isinstance(layer, nn.Linear):
            positions = result.numel() // result.shape[-1]
        elif isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
            positions = args[0].numel() // args[0].shape[1]
        else:
            positions = result.numel() // result.shape[1]
        total += kept * positions

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
    handles = [part.register_forward_hook(count) for part in module.modules() if isinstance(part, kinds)]
    inputs = Inputs.of(example_inputs)
    with torch.no_grad():
        module(*inputs.args, **inputs.kwargs)
    for handle in handles:
        handle.remove()
    return total


def count_parameters(module: nn.Module) -> int:
    """Count parameters, without those that masks zero; tied ones once."""
    zeros = {id(mask): int((~mask.mask).sum()) for mask in masked_weights(module).values()}
    return sum(parameter.numel() for parameter in module.parameters()) - sum(zeros.values())
