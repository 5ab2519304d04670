from __future__ import annotations

from collections.abc import Callable

import torch

from fxprune.graph.dump import dump
from passes import ShapePropagation
from tests.passes.nets import Residual, traced


def test_golden(golden: Callable[[str, str], None]) -> None:
    module = traced(Residual())
    for node in module.graph.nodes:
        if node.op != "placeholder":
            node.meta.clear()
    before = dump(module)
    result = ShapePropagation()(module)
    assert not result.modified
    golden("shape_propagation_before", before)
    golden("shape_propagation_after", dump(module))


def test_metadata_is_where_readers_of_graphs_look() -> None:
    module = traced(Residual())
    ShapePropagation()(module)
    stem = next(n for n in module.graph.nodes if n.name == "stem")
    assert stem.meta["tensor_meta"].shape == torch.Size([2, 4, 4, 4])
    assert stem.meta["tensor_meta"].dtype is torch.float32
    assert stem.meta["tensor_meta"].memory_format is torch.contiguous_format
