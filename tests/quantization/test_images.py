"""Images: depthwise convolutions, patches, and how channels lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

import fxprune
from fxprune.graph.passes import Pipeline
from fxprune.runtime.int8 import Int8DepthwiseConv2d, Int8Linear
from passes import BatchnormFolding
from tests.quantization.arithmetic import assert_computes_what_its_numbers_say
from tests.quantization.nets import Calls, InvertedResidual, counts, depthwise, images, layers, quantised
from tests.quantization.test_laws import ACTIVATIONS

STEPS = {
    "depthwise": lambda part, x: part.act(part.drop(part.deep(x))),
    "window": lambda part, x: part.act(part.window(x)),
    "stride": lambda part, x: part.act(part.stride(x)),
    "dense": lambda part, x: part.act(part.dense(x)),
    "unfolded": lambda part, x: part.act(part.unfolded(x)),
    "strided": lambda part, x: part.act(part.unfolded(x)[..., ::2, ::2]),
    "inverted": lambda part, x: x + part.back(part.act(part.wide_deep(part.act(part.wide(x))))),
    "excited": lambda part, x: (y := part.act(part.deep(x))) * torch.sigmoid(part.dense(y.mean((2, 3), keepdim=True))),
    "branches": lambda part, x: part.deep(x) + part.act(part.dense(x)),
    "split": lambda part, x: torch.cat([part.lesser(x.chunk(2, 1)[0]), x.chunk(2, 1)[1]], 1),
    "pooled": lambda part, x: part.pool(part.act(part.deep(x))),
}


class Drawn(nn.Module):
    """A network of images that takes steps one after the other."""

    def __init__(
        self, steps: list[tuple[str, type[nn.Module]]], channels: int, window: dict[str, Any], *, bias: bool
    ) -> None:
        super().__init__()
        self.steps = [step for step, _ in steps]
        self.parts = nn.ModuleList(_part(activation(), channels, window, bias=bias) for _, activation in steps)
        self.head = nn.Conv2d(channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for step, part in zip(self.steps, self.parts, strict=True):
            x = STEPS[step](part, x)
        return self.head(x)


def _part(activation: nn.Module, channels: int, window: dict[str, Any], *, bias: bool) -> nn.Module:
    return nn.ModuleDict(
        {
            "act": activation,
            "deep": depthwise(channels, bias=bias),
            "window": depthwise(channels, **window, bias=bias),
            "stride": depthwise(channels, 5, 2, bias=bias),
            "lesser": depthwise(channels // 2, bias=bias),
            "dense": nn.Conv2d(channels, channels, 1),
            "unfolded": nn.Conv2d(channels, channels, 3, padding=1, bias=bias),
            "wide": nn.Conv2d(channels, 2 * channels, 1),
            "wide_deep": depthwise(2 * channels),
            "back": nn.Conv2d(2 * channels, channels, 1),
            "drop": nn.Dropout(),
            "pool": nn.MaxPool2d(2, 1),
        }
    )


WINDOWS = st.one_of(
    st.sampled_from([3, 5]).map(lambda kernel: {"kernel": kernel, "padding": "same", "dilation": 2}),
    st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(0, 1)).map(
        lambda sizes: {
            "kernel": sizes[0],
            "dilation": sizes[1],
            "padding": sizes[1] * (sizes[0] - 1) // 2 + sizes[2],
        }
    ),
)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.sampled_from(ACTIVATIONS)), min_size=1, max_size=3),
    channels=st.sampled_from([4, 10]),
    window=WINDOWS,
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_quantised_graph_computes_what_its_numbers_say(
    steps: list[tuple[str, type[nn.Module]]], channels: int, window: dict[str, Any], bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = 3 * torch.randn(2, channels, 20, 17) + 1
    graph = images(Drawn(steps, channels, window, bias=bias), x, "*")
    assert_computes_what_its_numbers_say(graph, x)


def _calls(function: Callable[..., Any], *im2col: str, **modules: nn.Module) -> fx.GraphModule:
    torch.manual_seed(0)
    return images(Calls(function, **modules), torch.randn(2, 4, 8, 7), *im2col)


def _layers() -> dict[str, nn.Module]:
    return {
        **{name: depthwise(4) for name in "de"},
        **{name: nn.Conv2d(4, 4, 1) for name in "pq"},
        **{name: nn.Conv2d(4, 4, 3, padding=1) for name in ("dense", "other")},
        "act": nn.Hardswish(),
    }


def _excited(net: Any, x: Tensor) -> Tensor:
    y = net.act(net.d(net.p(x)))
    return net.q(y * y.mean((2, 3), keepdim=True))


BOUNDARIES: dict[str, tuple[Callable[..., Any], tuple[int, int], dict[str, str]]] = {
    "float before": (lambda net, x: net.d(torch.sin(x)), (1, 0), {"d": "f32"}),
    "chain": (lambda net, x: net.e(net.act(net.d(x))), (1, 0), {"d": "u8 hardswish", "e": "f32"}),
    "between": (lambda net, x: net.q(net.d(net.p(x)).relu()), (1, 0), {"p": "u8", "d": "u8 relu", "q": "f32"}),
    "excited": (_excited, (2, 1), {"p": "u8", "d": "u8 hardswish", "q": "f32"}),
    "both": (lambda net, x: net.d(y := torch.sin(x)) + net.p(y), (1, 0), {"d": "f32", "p": "f32"}),
    "residual": (lambda net, x: (y := net.p(x)) + net.d(y), (2, 0), {"p": "f32", "d": "f32"}),
    "table": (lambda net, x: net.act(net.d(x)), (1, 1), {"d": "u8 hardswish"}),
    "table and permute": (lambda net, x: torch.sin(net.act(net.d(x)).permute(0, 2, 3, 1)), (1, 1), {}),
    "patches": (lambda net, x: net.other(net.dense(torch.sin(x)).sin()), (2, 0), {}),
    "patches of levels": (lambda net, x: net.d(net.dense(net.p(x))), (1, 0), {"p": "u8", "dense": "u8"}),
    "spelled otherwise": (
        lambda net, x: net.d(torch.permute(torch.sin(x.permute((0, 2, 3, 1))), dims=(0, 3, -3, -2))),
        (1, 0),
        {"d": "f32"},
    ),
    "pool": (lambda net, x: net.q(functional.max_pool2d(net.d(x), 2)), (2, 0), {"d": "f32"}),
    "shared patches": (lambda net, x: net.dense(y := torch.sin(x)) + net.p(y), (1, 0), {"dense": "f32"}),
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_boundaries(name: str) -> None:
    function, boundaries, expected = BOUNDARIES[name]
    graph = _calls(function, *("*" for _ in [name] if "patches" in name), **_layers())
    x = torch.randn(2, 4, 8, 7)
    module = quantised(graph, x)
    assert counts(module) == boundaries, fxprune.dump(module)
    assert layers(module).items() >= expected.items()
    _assert_no_copies(module, x)
    assert float((module(x) - graph(x)).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("name", "expected"), [("float before", 2), ("spelled otherwise", 2), ("table and permute", 3), ("both", 3)]
)
def test_permutes_around_boundaries_cancel(name: str, expected: int) -> None:
    module = quantised(_calls(BOUNDARIES[name][0], **_layers()), torch.randn(2, 4, 8, 7))
    permutes = [node for node in module.graph.nodes if node.target in ("permute", torch.permute)]
    assert len(permutes) == expected, fxprune.dump(module)


class _Formats(fx.Interpreter):
    """Asserts that channels lie last in memory wherever levels are, and that they are found there."""

    seen = 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        leaf = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        given = [part for part in self.fetch_args_kwargs_from_env(n)[0] if isinstance(part, Tensor)]
        if isinstance(leaf, Int8DepthwiseConv2d):
            self.seen += 1
            assert all(part.is_contiguous(memory_format=torch.channels_last) for part in (*given, value)), n
        if isinstance(leaf, Int8Linear) or str(n.target).startswith("fxprune.im2col"):
            assert given[0].is_contiguous(), n
        if str(n.target).startswith("fxprune.dequantize"):
            assert given[0].is_contiguous(), n
        return value


def _assert_no_copies(module: fx.GraphModule, x: Tensor) -> int:
    """What quantised layers take lies in memory as they read it; return how many of them are depthwise."""
    running = _Formats(module)
    with torch.no_grad():
        assert torch.equal(running.run(x), module(x))
    return running.seen


@pytest.mark.parametrize(
    ("name", "depthwise_layers"), [("mobilenet_v2", 17), ("mobilenet_v3_large", 15), ("efficientnet_b0", 16)]
)
def test_levels_of_models_lie_as_their_readers_read_them(name: str, depthwise_layers: int) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    x = torch.randn(2, 3, 32, 32)
    fxprune.recalibrate_batchnorm(model, [torch.randn(4, 3, 64, 64)])
    folded = Pipeline((BatchnormFolding(),))(fxprune.trace(model, x)).graph_module
    module = quantised(images(folded, x, "*"), x, observer="min-max")
    assert _assert_no_copies(module, x) == depthwise_layers
    assert not [part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]


def test_patches_are_of_levels_and_filled_up_with_zero() -> None:
    graph = images(
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Hardswish()), torch.randn(1, 4, 9, 9), "*"
    )
    x = torch.rand(1, 4, 9, 9) * 6 - 2
    module = quantised(graph, x, observer="min-max")
    (node,) = (node for node in module.graph.nodes if str(node.target).startswith("fxprune.im2col"))
    assert node.meta["val"].dtype == torch.uint8
    assert node.args[-1] == node.args[0].args[2] > 0
    assert float((module(x) - graph(x)).abs().max()) < 0.1


def test_patches_that_floats_read_too_are_floats() -> None:
    graph = images(nn.Sequential(nn.Conv2d(4, 4, 3)), torch.randn(1, 4, 9, 9), "*")
    (patches,) = (node for node in graph.graph.nodes if str(node.target).startswith("fxprune.im2col"))
    (output,) = graph.graph.find_nodes(op="output")
    output.args = ((output.args[0], patches),)
    graph.recompile()
    x = torch.randn(1, 4, 9, 9)
    found, floats = quantised(graph, x)(x)
    assert torch.equal(
        floats.flatten(1, 2), functional.unfold(x, 3).unflatten(1, (4, 9)).permute(0, 3, 2, 1).flatten(2)
    )
    assert float((found - graph(x)[0]).abs().max()) < 0.1


def test_other_batches_and_image_sizes_than_the_example() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    graph = images(InvertedResidual(), x, "*")
    module = quantised(graph, x)
    for size in ((1, 3, 16, 16), (3, 3, 23, 18)):
        other = torch.randn(size)
        assert float((module(other) - graph(other)).abs().max()) < 0.2
