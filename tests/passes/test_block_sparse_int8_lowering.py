from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune.errors import SpecError
from fxprune.graph.passes import Pipeline
from fxprune.runtime.int8 import BlockSparseInt8Linear, pack, quantize, unpack
from passes import BlockSparseInt8Lowering
from tests.passes.quantized import UNIT, Chain, Joined, exactly, int8_linear, quantised

X = torch.linspace(-7, 7, 2 * 5 * 8).view(2, 5, 8)


def _graph(kind: type[nn.Module], seed: int = 0) -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(seed)
    x = X[..., :6] if kind is Chain else X
    return quantised(kind(), x), x


def _lowered(
    graph: fx.GraphModule, x: Tensor, backend: str | Mapping[str, str] = "native", **how: Any
) -> fx.GraphModule:
    """Lower a graph and assert every law."""
    step = Pipeline((BlockSparseInt8Lowering(backend, **how),))
    before, state, outputs = fxprune.dump(graph), copy.deepcopy(graph.state_dict()), graph(x)
    result = step(graph)
    assert result.modified
    assert fxprune.dump(graph) == before, "the input changed"
    assert all(torch.equal(value, graph.state_dict()[name]) for name, value in state.items())
    _assert_equal(graph(x), outputs)
    _assert_equal(exactly(result.graph_module)(x), outputs)
    assert not any(type(part).__name__ == "Int8Linear" for part in result.graph_module.modules())
    again = step(result.graph_module)
    assert not again.modified, "lowering is not idempotent"
    assert fxprune.dump(again.graph_module) == fxprune.dump(result.graph_module)
    return result.graph_module


def _assert_equal(found: Any, expected: Any) -> None:
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def _layers(module: nn.Module) -> dict[str, BlockSparseInt8Linear]:
    return {name: part for name, part in module.named_modules() if isinstance(part, BlockSparseInt8Linear)}


def _conversions(module: fx.GraphModule) -> list[str]:
    return [node.name for node in module.graph.nodes if node.target in (pack, unpack)]


@pytest.mark.parametrize("kind", [Chain, Joined])
def test_golden(kind: type[nn.Module], golden: Callable[[str, str], None]) -> None:
    graph, x = _graph(kind)
    golden(f"block_sparse_int8_lowering_{kind.__name__.lower()}", fxprune.diff(graph, _lowered(graph, x)))


@pytest.mark.parametrize("backend", ["native", "reference", {"*": "reference", "b": "native dense"}])
@pytest.mark.parametrize("kind", [Chain, Joined])
@pytest.mark.parametrize("block", ["1x4", "2x4", "4x4", "dense", (1, 4)])
def test_results_are_equal_bit_for_bit(kind: type[nn.Module], backend: Any, block: Any) -> None:
    graph, x = _graph(kind)
    if kind is Joined and not isinstance(backend, str):
        backend = {"stem": "reference", "left": "native 1x4"}
    lowered = _lowered(graph, x, backend, block=block)
    other = torch.randn(3, 4, x.shape[-1])
    _assert_equal(exactly(lowered)(other), graph(other))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["native", "reference", "native dense"]), min_size=5, max_size=5), st.integers(0, 99))
def test_any_mixture_of_backends_gives_the_same(backends: list[str], seed: int) -> None:
    graph, x = _graph(Joined, seed)
    _lowered(graph, x, dict(zip(["stem", "left", "right", "moved", "head"], backends, strict=True)))


def test_between_native_layers_values_are_packed_and_nothing_is_converted() -> None:
    graph, x = _graph(Chain)
    lowered = _lowered(graph, x)
    layouts = {name: (layer.input_layout, layer.output_layout) for name, layer in _layers(lowered).items()}
    assert layouts == {"a": ("packed",) * 2, "b": ("packed",) * 2, "c": ("packed", "channels-last")}
    assert [node.args[3] for node in lowered.graph.nodes if node.target is quantize] == ["packed"]
    assert _conversions(lowered) == []


def test_other_backends_get_values_as_they_take_them() -> None:
    graph, x = _graph(Chain)
    lowered = _lowered(graph, x, "reference")
    assert {layer.input_layout for layer in _layers(lowered).values()} == {"channels-last"}
    assert _conversions(lowered) == []


class Fan(nn.Module):
    """One value that three layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = int8_linear(8, 8)
        self.heads = nn.ModuleList(int8_linear(8, 4, is_last=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(quantize(x, UNIT.scale, UNIT.zero_point, "channels-last"))
        return sum(head(y) for head in self.heads)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("backends", "conversions"),
    [
        ({"heads.2": "reference"}, ["stem_unpacked"]),
        ({"heads.1": "reference", "heads.2": "reference"}, []),
        ({"stem": "reference"}, ["stem_packed"]),
        ({"stem": "reference", "heads.2": "reference"}, []),
    ],
)
def test_a_value_that_readers_want_otherwise_is_converted_once_or_not_packed(
    backends: dict[str, str], conversions: list[str]
) -> None:
    torch.manual_seed(0)
    assert _conversions(_lowered(quantised(Fan(), X), X, backends)) == conversions


def test_conversions_that_cancel_are_taken_away() -> None:
    torch.manual_seed(0)

    class Converted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = int8_linear(8, 8), int8_linear(8, 4, is_last=True)

        def forward(self, x: Tensor) -> Tensor:
            y = unpack(pack(quantize(x, UNIT.scale, UNIT.zero_point, "channels-last")), 8)
            return self.b(unpack(pack(self.a(y)), 8))

    lowered = _lowered(quantised(Converted(), X), X)
    assert _conversions(lowered) == []


class Again(nn.Module):
    """One layer that is called twice, the second time on what was moved."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = int8_linear(8, 8, 0.5), int8_linear(8, 8, is_last=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(quantize(x, UNIT.scale, UNIT.zero_point, "channels-last"))
        return self.last(self.layer(y.flip(1)))


def test_a_layer_that_is_called_twice_reads_and_writes_alike() -> None:
    torch.manual_seed(0)
    lowered = _lowered(quantised(Again(), X), X)
    assert len(_layers(lowered)) == 2


def test_a_layer_under_two_names_stays_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.last = int8_linear(8, 8), int8_linear(8, 8, is_last=True)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.b(self.a(quantize(x, UNIT.scale, UNIT.zero_point, "channels-last"))))

    lowered = _lowered(quantised(Shared(), X), X)
    assert len(_layers(lowered)) == 2


@pytest.mark.parametrize("block", ["1x4", "dense"])
def test_weights_that_are_all_zero_give_what_the_biases_are(block: str) -> None:
    torch.manual_seed(0)
    graph = quantised(nn.Sequential(int8_linear(8, 5, 1.0), int8_linear(5, 3, 1.0, is_last=True)), X.to(torch.uint8))
    lowered = _lowered(graph, X.abs().to(torch.uint8), block=block)
    outputs = lowered(X.abs().to(torch.uint8))
    assert torch.equal(outputs, outputs[:1, :1].expand(2, 5, 3))
    assert {layer.sparsity for layer in _layers(lowered).values()} == ({1.0} if block == "1x4" else {0.0})


@pytest.mark.parametrize(
    ("backend", "block", "expected"),
    [
        ("native", "1x4", {"a": (1, 4), "b": (4, 4), "c": (1, 4)}),
        ("native dense", "1x4", {"a": (4, 4), "b": (4, 4), "c": (4, 4)}),
        ("native 2x4", "1x4", {"a": (2, 4), "b": (2, 4), "c": (2, 4)}),
        ("onednn", "dense", {"a": (4, 4), "b": (4, 4), "c": (4, 4)}),
        ("fbgemm", "dense", {"a": (1, 4), "b": (1, 4), "c": (1, 4)}),
        ({"[ab]": "fbgemm", "b": "native"}, "1x4", {"a": (1, 4), "b": (4, 4), "c": (1, 4)}),
    ],
)
def test_a_weight_is_stored_as_asked_or_as_fits_it(backend: Any, block: str, expected: Any) -> None:
    torch.manual_seed(0)

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = int8_linear(8, 8, 0.7), int8_linear(8, 8), int8_linear(8, 8, 0.7, is_last=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    graph = quantised(Three(), X.to(torch.uint8))
    lowered = Pipeline((BlockSparseInt8Lowering(backend, block),))(graph).graph_module
    assert {name: layer.block for name, layer in _layers(lowered).items()} == expected
    weights = {name: layer.weight for name, layer in _layers(lowered).items()}
    assert all(torch.equal(weight, graph.get_submodule(name).weight) for name, weight in weights.items())  # type: ignore[arg-type]


def test_a_graph_of_floats_is_left_alone() -> None:
    graph = fxprune.trace(nn.Sequential(nn.Linear(8, 4)), X)
    assert not Pipeline((BlockSparseInt8Lowering(),))(graph).modified


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onednm"}, "unknown backend 'onednm'; did you mean 'onednn'"),
        ({"backend": "auto"}, "'auto' is chosen by measuring, which fxprune.lower does; known here: native, onednn"),
        ({"backend": {"a": "native 1by4"}}, "cannot read the block '1by4'"),
        ({"block": "4"}, "cannot read the block '4'"),
        ({"backend": {"d": "native"}}, "no layer matches 'd'"),
        ({"backend": {"drop": "native"}}, "'drop' is no quantised layer; these are: a, b, c"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline((BlockSparseInt8Lowering(**options),))(_graph(Chain)[0])
