from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.graph.passes import Pipeline
from passes import DeadCodeElimination
from tests.passes.nets import Residual, traced


class Unused(Residual):
    def forward(self, x: Tensor) -> Tensor:
        self.branch(self.stem(x)).sigmoid()
        return self.stem(x)


def test_golden(golden: Callable[[str, str], None]) -> None:
    module = traced(Unused())
    result = Pipeline((DeadCodeElimination(),))(module)
    assert result.modified
    golden("dead_code_elimination", fxprune.diff(module, result.graph_module))
    assert not hasattr(result.graph_module, "branch")
    assert not Pipeline((DeadCodeElimination(),))(result.graph_module).modified


class Writing(nn.Module):
    """Writes in place by statements, whose results nothing reads."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.write, self.a, self.b, self.act = write, nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        functional.relu(self.b(x), inplace=True)  # of a value that nothing else reads
        self.write(y)
        self.act(y)
        return y * 2


_WRITES: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda y: y.add_(1),
    "function": lambda y: functional.relu(y, inplace=True),
    "item": lambda y: operator.setitem(y, (slice(None), 0), 7.0),
    "view": lambda y: y.view(-1)[1:].mul_(3),
    "out": lambda y: torch.mul(y, 2.0, out=y),
}


@pytest.mark.parametrize("write", _WRITES.values(), ids=_WRITES)
@torch.no_grad()
def test_what_is_written_into_values_that_are_read_stays(write: Callable[[Tensor], Any]) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model = Writing(write)
    result = Pipeline((DeadCodeElimination(identities=True),))(fxprune.trace(model, x)).graph_module
    assert torch.equal(result(x), model(x))
    assert not hasattr(result, "b")


class Counting(nn.Module):
    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        return x * 2


def test_what_is_written_into_an_input_stays() -> None:
    x, count = torch.rand(2), torch.zeros(1)
    module = fxprune.trace(Counting(), (x, count))
    result = Pipeline((DeadCodeElimination(),))(module)
    assert not result.modified
    result.graph_module(x, count)
    assert count == 1


def test_tensors_that_nothing_reads_go() -> None:
    x = torch.rand(2, 3, 4, 4)
    module = fxprune.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval(), x, frontend="export")
    result = Pipeline((DeadCodeElimination(),))(module)
    assert result.modified
    gone = module.state_dict().keys() - result.graph_module.state_dict().keys()
    assert gone == {"1.num_batches_tracked"}
    assert torch.equal(result.graph_module(x), module(x))


class Peeking(nn.Module):
    """Reads a parameter of a layer for nothing, and calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.fc.bias.abs()
        return self.fc(x)


def test_tensors_of_layers_that_are_called_stay() -> None:
    result = Pipeline((DeadCodeElimination(),))(fxprune.trace(Peeking(), torch.rand(2, 4)))
    assert result.modified
    assert result.graph_module.get_submodule("fc").bias is not None


def test_identities_go_on_request() -> None:
    module = fxprune.trace(nn.Sequential(nn.Identity(), nn.Linear(4, 4), nn.Dropout(), nn.Identity()), torch.rand(2, 4))
    assert not Pipeline((DeadCodeElimination(),))(module).modified
    result = Pipeline((DeadCodeElimination(identities=True),))(module)
    assert result.modified
    assert [type(part) for part in result.graph_module.children()] == [nn.Linear, nn.Dropout]
    assert not Pipeline((DeadCodeElimination(identities=True),))(result.graph_module).modified
