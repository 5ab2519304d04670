from __future__ import annotations

from collections.abc import Callable

from fxprune.graph.dump import dump
from passes import OrbitDetection
from tests.passes.nets import Concatenation, Residual, traced


def test_golden(golden: Callable[[str, str], None]) -> None:
    for model in (Residual(), Concatenation()):
        module = traced(model)
        assert not OrbitDetection()(module).modified
        golden(f"orbit_detection_{type(model).__name__.lower()}", dump(module))
