from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

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
