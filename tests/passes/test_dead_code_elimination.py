from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

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


def test_identities_go_on_request() -> None:
    module = fxprune.trace(nn.Sequential(nn.Identity(), nn.Linear(4, 4), nn.Dropout(), nn.Identity()), torch.rand(2, 4))
    assert not Pipeline((DeadCodeElimination(),))(module).modified
    result = Pipeline((DeadCodeElimination(identities=True),))(module)
    assert result.modified
    assert [type(part) for part in result.graph_module.children()] == [nn.Linear, nn.Dropout]
    assert not Pipeline((DeadCodeElimination(identities=True),))(result.graph_module).modified
