from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import fxprune
from fxprune.errors import InputError, SpecError, UsageError
from fxprune.graph.passes import Pipeline, parse_spec
from fxprune.quantization import Range, Ranges, calibrate, float_layers
from fxprune.runtime.int8 import Int8Linear
from fxprune.runtime.weight_masks import finalize, mask_weight
from passes import PASSES, BatchnormFolding, Conv1x1ToLinear, Quantization
from tests.quantization.nets import (
    Attention,
    InvertedResidual,
    Mixed,
    Mlp,
    images,
    layers,
    quantised,
    unit_ranges,
)


def _graph(model: nn.Module) -> fx.GraphModule:
    torch.manual_seed(0)
    return fxprune.trace(model.eval(), torch.randn(2, 6, 8))


def _laws(graph: fx.GraphModule, *batches: Tensor, cosine: float = 0.99, **options: Any) -> fx.GraphModule:
    """Quantise a graph and assert the laws: its input untouched, truthful, idempotent, near the float graph."""
    before, state = fxprune.dump(graph), copy.deepcopy(graph.state_dict())
    step = Quantization(ranges=calibrate(graph, batches), **options)
    result = Pipeline((step,))(graph)
    module = result.graph_module
    assert fxprune.dump(graph) == before
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())
    assert result.modified == (fxprune.dump(module) != before)
    again = Pipeline((step,))(module)
    assert not again.modified
    assert fxprune.dump(again.graph_module) == fxprune.dump(module)
    assert float_layers(again.graph_module) == float_layers(module)
    with torch.no_grad():
        for batch in batches:
            found, expected = module(batch).flatten(1), graph(batch).flatten(1)
            assert float(torch.cosine_similarity(found, expected).min()) > cosine
            assert torch.equal(copy.deepcopy(module)(batch).flatten(1), found)
    return module


@pytest.mark.parametrize("model", [Attention, Mlp, Mixed])
def test_golden(golden: Callable[[str, str], None], model: type[nn.Module]) -> None:
    graph = _graph(model())
    module = Pipeline((Quantization(ranges=unit_ranges(graph)),))(graph).graph_module
    golden(f"quantization_{model.__name__.lower()}", fxprune.diff(graph, module))


@pytest.mark.parametrize("im2col", [(), ("*",)], ids=["", "im2col"])
def test_golden_images(golden: Callable[[str, str], None], im2col: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    graph = images(InvertedResidual(), torch.randn(2, 3, 16, 16), *im2col)
    module = Pipeline((Quantization(ranges=unit_ranges(graph)),))(graph).graph_module
    golden("_".join(["quantization_inverted_residual", *("im2col" for _ in im2col)]), fxprune.diff(graph, module))


@pytest.mark.parametrize("model", [Attention, Mlp, Mixed])
def test_laws(model: type[nn.Module]) -> None:
    module = _laws(_graph(model()), torch.randn(2, 6, 8), torch.randn(5, 6, 8))
    assert not float_layers(module)
    assert not [part for part in module.modules() if isinstance(part, nn.Linear)]


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "resnet18"])
def test_models(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    fxprune.recalibrate_batchnorm(model, [torch.randn(4, 3, 64, 64)])
    x = torch.randn(2, 3, 64, 64)
    graph = Pipeline((BatchnormFolding(), Conv1x1ToLinear()))(fxprune.trace(model, x)).graph_module
    module = _laws(graph, x, cosine=0.9)
    assert not [part for part in module.modules() if isinstance(part, nn.Linear)]
    assert not [part for part in module.modules() if isinstance(part, nn.Conv2d) and part.groups > 1]
    convolutions = {path for path, part in module.named_modules() if isinstance(part, nn.Conv2d)}
    assert {path for path, _ in float_layers(module)} == convolutions


def test_a_weight_of_zeros_has_a_defined_result() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[2].weight)
    graph = _graph(model)
    x = torch.randn(2, 6, 8)
    module = quantised(graph, x)
    assert torch.allclose(module(x), graph(x), atol=1e-6)
    nn.init.zeros_(model[0].bias)
    assert torch.allclose(quantised(_graph(model), x)(x), model(x), atol=1e-6)


class Own(nn.Linear):
    """A linear layer that is not only one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


class Named(nn.Linear):
    """A linear layer with a name."""


class Kept(nn.Module):
    """Linear layers that stay in float, each for another reason, and some that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.own, self.named = nn.Linear(8, 8), Own(8, 8), Named(8, 8)
        self.computed, self.hooked = parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda *_: None)
        self.doubled, self.infinite, self.by_name = nn.Linear(8, 8).double(), nn.Linear(8, 8), nn.Linear(8, 8)
        self.wide, self.narrow = nn.Linear(1, 70_000, bias=False), nn.Linear(70_000, 8)
        self.tied, self.first = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.first.weight
        with torch.no_grad():
            self.infinite.weight[0, 0] = float("inf")

    def forward(self, x: Tensor) -> Tensor:
        x = self.by_name(input=self.named(self.own(self.twice(self.twice(x)))))
        x = self.hooked(self.computed(x)) + self.doubled(x.to(torch.float64)).to(torch.float32)
        x = self.tied(self.first(x)) + self.narrow(self.wide(x[..., :1]))
        return x + self.infinite(x).nan_to_num(0, 0, 0)


def test_what_stays_in_float_says_why() -> None:
    module = quantised(_graph(Kept()))
    reasons = dict(float_layers(module))
    expected = {
        "twice": "it is called 2 times",
        "own": "its class Own computes",
        "by_name": "it is not called as layer(input)",
        "computed": "its weight is computed by a parametrisation",
        "hooked": "hooks take part",
        "doubled": "its weight is float64, and only float32",
        "narrow": "its sums of 70,000 products; 66,311 are the most",
        "infinite": "its weight or bias is not finite",
    }
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name]
    assert layers(module).keys() == {"named", "wide", "tied", "first"}


def test_depthwise_convolutions_can_be_chosen() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    graph = images(InvertedResidual(), x)
    assert layers(_laws(graph, x)).keys() == {"expand", "middle", "project"}
    for options, reason in (
        ({"depthwise": False}, "no depthwise convolution was asked for"),
        ({"exclude": ("middle",)}, "it was excluded"),
        ({"layers": ("expand", "project")}, "it was not asked for"),
        ({"keep_float": {"middle": "it is slow"}, "depthwise": False}, "it is slow"),
    ):
        module = _laws(graph, x, **options)
        assert layers(module).keys() == {"expand", "project"}
        assert dict(float_layers(module))["middle"] == reason
    assert layers(_laws(graph, x, layers=("Conv2d",))).keys() == {"middle"}


def test_masked_depthwise_weights_are_finalised_first() -> None:
    model = InvertedResidual()
    mask_weight([(model.middle, "weight")], torch.rand(16, 1, 3, 3) < 0.5)
    graph = images(model, torch.randn(2, 3, 16, 16))
    with pytest.raises(InputError, match=r"the weight of 'middle' is masked; .* fxprune\.finalize"):
        Pipeline((Quantization(ranges=unit_ranges(graph)),))(graph)


def test_a_quantised_graph_computes_the_same_in_training_mode() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    for graph, given in ((images(InvertedResidual(), x), x), (_graph(Mlp()), torch.randn(2, 6, 8))):
        module = quantised(graph, given)
        expected = module(given)
        assert torch.equal(module.train()(given), expected)


def test_layers_can_be_chosen() -> None:
    graph = _graph(Mixed())
    module = _laws(
        graph,
        torch.randn(2, 6, 8),
        layers=("attention", "mlp"),
        exclude=("mlp.fc2",),
        keep_float={"attention.q": "it is slower in int8"},
    )
    assert layers(module).keys() == {"attention.k", "attention.v", "attention.out", "mlp.fc1"}
    reasons = dict(float_layers(module))
    assert reasons["attention.q"] == "it is slower in int8"
    assert reasons["mlp.fc2"] == "it was excluded"
    assert reasons["head"] == "it was not asked for"
    everything = _laws(graph, torch.randn(2, 6, 8), exclude=("Linear",))
    assert not layers(everything)


def test_a_value_that_was_not_seen_is_not_quantised() -> None:
    graph = _graph(Mlp())
    ranges = Ranges("given", {"x": Range(-1.0, 1.0)})
    module = Pipeline((Quantization(ranges=ranges),))(graph).graph_module
    assert layers(module) == {"fc1": "f32"}
    assert dict(float_layers(module)) == {"fc2": "calibration saw no float32 value of 'act'"}


def test_masks_are_finalised_first() -> None:
    model = Mlp()
    mask_weight([(model.fc1, "weight")], torch.rand(16, 8) < 0.5)
    graph, x = _graph(model), torch.randn(2, 6, 8)
    ranges = calibrate(graph, [x])
    with pytest.raises(InputError, match=r"the weight of 'fc1' is masked; .* fxprune\.finalize"):
        Pipeline((Quantization(ranges=ranges),))(graph)
    partly = Pipeline((Quantization(ranges=ranges, exclude=("fc1",)),))(graph).graph_module
    assert layers(partly) == {"fc2": "f32"}
    sparse = finalize(copy.deepcopy(graph))
    layer = Pipeline((Quantization(ranges=ranges),))(sparse).graph_module.get_submodule("fc1")
    assert isinstance(layer, Int8Linear)
    assert not layer.weight[sparse.get_parameter("fc1.weight") == 0].any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {},
            InputError,
            r"needs the ranges of the graph's values; .*fxprune\.quantization\.calibrate\(graph, batches\)",
        ),
        ({"ranges": Ranges("given", {"y": Range(0, 1)})}, InputError, "the ranges are of another graph"),
        ({"layers": ("fc3",)}, SpecError, "no layer matches 'fc3'; did you mean 'fc1'|'fc2'"),
        ({"exclude": ("Conv2d",)}, SpecError, "no layer matches 'Conv2d'"),
        ({"keep_float": {"fc": "slow"}}, SpecError, "keep_float names 'fc', which the graph does not have"),
    ],
)
def test_bad_calls(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Pipeline((Quantization(**options),))(_graph(Mlp()))


def test_training_mode_is_refused() -> None:
    graph = _graph(Mlp())
    ranges = calibrate(graph, [torch.randn(2, 6, 8)])
    with pytest.raises(UsageError, match="the graph is in training mode"):
        Pipeline((Quantization(ranges=ranges),))(graph.train())


def test_without_linear_layers_nothing_changes() -> None:
    graph = _graph(nn.Sequential(nn.Conv1d(6, 3, 1), nn.ReLU()))
    result = Pipeline((Quantization(),))(graph)
    assert not result.modified
    assert float_layers(result.graph_module) == (("0", "no rule says how a Conv1d computes on uint8"),)


def test_a_spec_says_what_is_quantised() -> None:
    step = Quantization(("fc1", "head.*"), ("Linear",), unit_ranges(_graph(Mlp())), {"fc1": "slow"})
    assert str(step) == step.record() == "quantization{layers=fc1|head.*,exclude=Linear}"
    assert parse_spec(str(step), PASSES) == (step,)
    without = Quantization(depthwise=False)
    assert str(without) == "quantization{depthwise=False}"
    assert parse_spec(str(without), PASSES) == (without,)
