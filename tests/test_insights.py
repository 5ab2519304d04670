"""Roles of layers, profiles of sparse models, and the sensitivity of single layers."""

from __future__ import annotations

import copy
import json
import statistics
from collections import Counter
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize

import fxprune
from fxprune.errors import InputError, SpecError, TargetError, UsageError
from fxprune.insights import ROLES, Sensitivity, layer_depths, layer_roles, sparsity_profile
from fxprune.runtime.weight_masks import masked_weights
from fxprune.zoo import ModelSource, build_model
from tests.nets import Net

IMAGE = torch.zeros(2, 8, 6, 6)


def _conv(inputs: int, outputs: int, size: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def _pool(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _excite_linear(net: Any, x: Tensor) -> Tensor:
    y = net.up(torch.relu(net.down(x.mean((2, 3)))))
    return x * torch.sigmoid(y).view(-1, 8, 1, 1)


def _excite_expanded(net: Any, x: Tensor) -> Tensor:
    return x * net.up(net.down(_pool(x))).sigmoid().expand_as(x)


def _excite_by_two_pools(net: Any, x: Tensor) -> Tensor:
    peak = nn.functional.adaptive_max_pool2d(x, 1)
    return torch.mul(nn.functional.hardsigmoid(net.up(net.down(_pool(x))) + net.up(net.down(peak))), x)


def _excite_tokens(net: Any, x: Tensor) -> Tensor:
    return x * net.conv(x.mean((2, 3)).view(2, 1, 8)).view(2, 8, 1, 1).sigmoid()


def _excite_in_place(net: Any, x: Tensor) -> Tensor:
    gate = net.up(net.down(_pool(x)))
    x = net.stem(x)
    x *= gate
    return x


def _split_attention(net: Any, x: Tensor) -> Tensor:
    y = torch.stack([net.left(x), net.right(x)], 1)
    attention = net.up(net.down(_pool(y.sum(1)))).view(2, 2, 8, 1, 1).softmax(1)
    return (y * attention).sum(1)


def _spatial_attention(net: Any, x: Tensor) -> Tensor:
    y = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * net.wide(y).sigmoid() * net.narrow(y).sigmoid()


def _added(net: Any, x: Tensor) -> Tensor:
    return x + net.up(net.down(_pool(x)))


def _pyramid(net: Any, x: Tensor) -> Tensor:
    whole = nn.functional.interpolate(net.image(_pool(x)), x.shape[-2:])
    return net.project(torch.cat([x, whole], 1))


def _decoder(net: Any, x: Tensor) -> Tensor:
    return net.wide(net.grow(_pool(x)))


def _pointwise(net: Any, x: Tensor) -> Tensor:
    return nn.functional.conv2d(x, net.weight)


def _functional() -> Net:
    net = Net(_pointwise)
    net.weight = nn.Parameter(torch.rand(4, 8, 1, 1))
    return net


def _conditioned(net: Any, x: Tensor) -> Tensor:
    return x * net.up(torch.ones(2, 4)).view(2, 8, 1, 1)


SE, PW, PWL, OTHER = "squeeze-excite", "expansion", "bottleneck", "other"

CASES = {
    "expansion and bottleneck": (nn.Sequential(_conv(8, 16), _conv(16, 4), _conv(4, 4)), (PW, PWL, PWL)),
    "spatial, depthwise and grouped": (
        nn.Sequential(_conv(8, 16, 3), _conv(16, 16, 3, groups=16), _conv(16, 16, groups=16), _conv(16, 32, groups=4)),
        (OTHER, OTHER, OTHER, PW),
    ),
    "a transposed one": (nn.Sequential(nn.ConvTranspose2d(8, 16, 1), nn.ConvTranspose2d(16, 4, 2, 2)), (PW, OTHER)),
    "the head": (
        nn.Sequential(nn.AdaptiveAvgPool2d(1), _conv(8, 16), nn.Hardswish(), nn.Flatten(), nn.Linear(16, 4)),
        (OTHER, OTHER),
    ),
    "linear layers": (Net(_excite_linear, down=nn.Linear(8, 2), up=nn.Linear(2, 8)), (SE, SE)),
    "expand_as": (Net(_excite_expanded, down=_conv(8, 2), up=_conv(2, 8)), (SE, SE)),
    "two pools": (Net(_excite_by_two_pools, down=_conv(8, 2), up=_conv(2, 8)), (SE, SE)),
    "a vector of channels": (Net(_excite_tokens, conv=nn.Conv1d(1, 1, 3, padding=1)), (SE,)),
    "in place": (Net(_excite_in_place, down=_conv(8, 2), up=_conv(2, 8), stem=_conv(8, 8, 3)), (SE, SE, OTHER)),
    "split attention": (
        Net(_split_attention, left=_conv(8, 8, 3), right=_conv(8, 8, 5), down=_conv(8, 2), up=_conv(2, 16)),
        (OTHER, OTHER, SE, SE),
    ),
    "attention in space": (Net(_spatial_attention, wide=_conv(2, 1, 3), narrow=_conv(2, 1)), (OTHER, PWL)),
    "added, not multiplied": (Net(_added, down=_conv(8, 2), up=_conv(2, 8)), (OTHER, OTHER)),
    "an image pooled into a pyramid": (Net(_pyramid, image=_conv(8, 4), project=_conv(12, 8)), (OTHER, PWL)),
    "maps grown from a pool": (Net(_decoder, grow=nn.ConvTranspose2d(8, 4, 4), wide=_conv(4, 8)), (OTHER, PW)),
    "a function": (_functional(), (PWL,)),
    "a gate that no pool feeds": (Net(_conditioned, up=nn.Linear(4, 8)), (OTHER,)),
}


@pytest.mark.parametrize(("net", "roles"), CASES.values(), ids=CASES)
def test_roles_come_from_graph_and_shapes(net: nn.Module, roles: tuple[str, ...]) -> None:
    assert tuple(layer_roles(fxprune.trace(net, IMAGE)).values()) == roles
    exported = layer_roles(fxprune.trace(net, IMAGE, frontend="export"))
    assert set(exported.values()) == set(roles), "an exported graph has a node for every call"


def test_an_image_without_batch_has_channels_too() -> None:
    net = nn.Sequential(_conv(3, 6), _conv(6, 2), _conv(2, 2, groups=2))
    assert tuple(layer_roles(fxprune.trace(net, torch.rand(3, 4, 4))).values()) == (PW, PWL, OTHER)


def test_a_graph_without_multiply_accumulates_has_an_empty_profile() -> None:
    assert sparsity_profile(fxprune.trace(nn.Sequential(nn.ReLU()), torch.rand(1, 3))).layers == ()


def _counts(graph: fx.GraphModule) -> dict[str, int]:
    return dict(Counter(layer_roles(graph).values()))


MODELS = [
    ("torchvision:mobilenet_v2", {OTHER: 19, PWL: 17, PW: 17}, None),
    ("torchvision:mobilenet_v3_small", {OTHER: 14, PWL: 11, PW: 11, SE: 18}, ".fc"),
    ("torchvision:efficientnet_b0", {OTHER: 18, PWL: 16, PW: 16, SE: 32}, ".fc"),
    ("torchvision:resnet50", {OTHER: 18, PWL: 16, PW: 20}, None),
    ("timm:fbnetv3_b", {OTHER: 32, PWL: 29, PW: 28, SE: 36}, ".se."),
    ("timm:regnety_004", {OTHER: 18, PWL: 28, PW: 8, SE: 32}, ".se."),
    ("timm:legacy_seresnet18", {OTHER: 18, PW: 3, SE: 16}, ".se_module."),
    ("timm:skresnet18", {OTHER: 26, PW: 3, SE: 16}, ".attn."),
]


@pytest.mark.parametrize(("name", "counts", "part"), MODELS, ids=[name for name, *_ in MODELS])
def test_roles_of_known_models(name: str, counts: dict[str, int], part: str | None) -> None:
    pytest.importorskip(name.partition(":")[0])
    built = build_model(ModelSource(name))
    roles = layer_roles(fxprune.trace(built.model, built.inputs))
    assert dict(Counter(roles.values())) == counts
    assert {layer for layer, role in roles.items() if role == SE} == {
        x for x in roles if part is not None and part in x
    }


def test_slim_and_sparse_graphs_have_the_roles_of_the_model() -> None:
    model, image = torchvision.models.mobilenet_v3_small().eval(), torch.zeros(1, 3, 64, 64)
    before = layer_roles(fxprune.trace(model, image))
    slim = fxprune.prune(model, image, ratio="25%", scope="uniform")
    sparse = fxprune.sparsify(slim.module, image, sparsity="50%")
    assert layer_roles(slim.module) == before
    assert layer_roles(sparse.module) == before


def test_depth_counts_layers_on_the_longest_way() -> None:
    net = Net(lambda net, x: net.c(net.b(net.a(x)) + x) + net.d(x), **{n: _conv(8, 8) for n in "abcd"})
    assert layer_depths(fxprune.trace(net, IMAGE)) == {"a": 1, "b": 2, "c": 3, "d": 1}


def test_a_layer_called_twice_goes_by_its_first_call() -> None:
    net = Net(lambda net, x: net.b(net.a(net.a(x))), a=_conv(8, 8), b=_conv(8, 8))
    graph = fxprune.trace(net, IMAGE)
    assert layer_roles(graph) == {"a": PWL, "b": PWL}
    assert layer_depths(graph) == {"a": 1, "b": 3}
    rows = {row.layer: row for row in sparsity_profile(graph).layers}
    assert rows["a"].macs[0] == 2 * rows["b"].macs[0]


def test_a_profile_sums_up_to_the_report() -> None:
    result = fxprune.sparsify(torchvision.models.mobilenet_v3_small().eval(), torch.zeros(1, 3, 64, 64), macs="60%")
    profile = sparsity_profile(result.traced, result.report)
    assert tuple(sum(role.macs[side] for role in profile.roles) for side in (0, 1)) == result.report.macs
    reported = {row.layer: row.sparsity[1] for row in result.report.layers}
    assert all(row.sparsity == reported[row.layer] for row in profile.layers)
    assert [role.role for role in profile.roles] == [role for role in ROLES if role in _counts(result.traced)]
    assert sum(role.layers for role in profile.roles) == len(profile.layers)


def test_a_profile_prints_as_tables_and_json() -> None:
    net = nn.Sequential(_conv(8, 16), _conv(16, 4))
    result = fxprune.sparsify(net, IMAGE, sparsity={"0": 0.75}, block="1x1")
    profile = sparsity_profile(result.traced, result.report)
    lines = [line.split() for line in profile.table().splitlines()]
    assert ["0", "expansion", "1", "75.0%", "9,216", "2,304"] in lines
    assert ["bottleneck", "1", "4,608", "4,608", "33.3%", "66.7%"] in lines
    assert profile.table("github").startswith("| layer")
    facts = json.loads(profile.json())
    assert facts["layers"][0] == {"layer": "0", "role": PW, "depth": 1, "sparsity": 0.75, "macs": [9216, 2304]}
    assert facts["roles"][1] == {"role": PWL, "layers": 1, "macs": [4608, 4608]}


def _network() -> nn.Sequential:
    torch.manual_seed(1)
    excite = Net(_excite_linear, down=nn.Linear(8, 2), up=nn.Linear(2, 8))
    return nn.Sequential(_conv(8, 16), nn.BatchNorm2d(16), nn.ReLU(), _conv(16, 8), excite, _conv(8, 4, 3)).eval()


def _total(module: nn.Module) -> float:
    with torch.no_grad():
        return float(module(torch.ones(2, 8, 6, 6)).sum())


class _Watched:
    """A model with everything about it that must stay."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._state()
        self.tensors = {name: value.clone() for name, value in model.state_dict().items()}

    def _state(self) -> list[Any]:
        parts = [(name, type(part), part.training, sorted(part.__dict__)) for name, part in self.model.named_modules()]
        return [parts, [(name, id(p), p.grad) for name, p in self.model.named_parameters()]]

    def assert_untouched(self) -> None:
        assert self._state() == self.before
        assert all(torch.equal(value, self.tensors[name]) for name, value in self.model.state_dict().items())


def test_every_layer_is_measured_as_if_it_were_pruned_alone() -> None:
    model = _network()
    found = fxprune.sensitivity(model, IMAGE, _total, sparsity=0.8, layers=("all",))
    assert [row.layer for row in found.layers] == ["0", "3", "4.down", "4.up", "5"]
    assert [row.role for row in found.layers] == [PW, PWL, SE, SE, OTHER]
    assert found.baseline == _total(model)
    for row in found.layers:
        alone = fxprune.sparsify(model, IMAGE, sparsity=0.8, block="1x1", scope="uniform", layers=(row.layer,))
        mask = masked_weights(alone.module)[f"{row.layer}.weight"].mask
        assert row.value == _total(alone.module)
        assert row.drop == found.baseline - row.value
        assert row.sparsity == pytest.approx(1 - mask.float().mean().item())
        assert row.sparsity >= 0.8


def test_one_copy_is_masked_in_one_layer_at_a_time() -> None:
    modules: list[nn.Module] = []
    masked: list[set[str]] = []

    def evaluate(module: nn.Module) -> float:
        modules.append(module)
        masked.append(set(masked_weights(module)))
        return 0.0

    model = _network()
    fxprune.sensitivity(model, IMAGE, evaluate)
    assert masked == [set(), {"0.weight"}, {"3.weight"}]
    assert all(module is modules[0] for module in modules)
    assert not {id(p) for p in modules[0].parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_untouched_whatever_an_evaluation_does(training: bool) -> None:
    model = _network().train(training)
    watched = _Watched(model)
    starts = []

    def evaluate(module: nn.Module) -> float:
        value = _total(copy.deepcopy(module).eval())
        starts.append(value)
        module.train()
        module(torch.randn(4, 8, 6, 6)).square().mean().backward()
        with torch.no_grad():
            for parameter in module.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
        return value

    found = fxprune.sensitivity(model, IMAGE, evaluate)
    watched.assert_untouched()
    again = fxprune.sensitivity(model, IMAGE, lambda module: _total(copy.deepcopy(module).eval()))
    assert (found.baseline, found.layers) == (again.baseline, again.layers), (
        "every layer starts from the model's weights"
    )


@pytest.mark.parametrize(("failing", "where"), [(0, "the dense model"), (2, "'3' pruned to 95.3%")])
def test_a_failing_evaluation_names_the_layer_and_leaves_the_model(failing: int, where: str) -> None:
    watched = _Watched(_network())
    calls = iter(range(10))

    def evaluate(_: nn.Module) -> float:
        if next(calls) == failing:
            raise ValueError("no images")
        return 1.0

    with pytest.raises(InputError, match=f"evaluating {where} failed: ValueError: no images"):
        fxprune.sensitivity(watched.model, IMAGE, evaluate)
    watched.assert_untouched()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "gave nan; return a finite number"),
        (float("inf"), "gave inf"),
        (None, "failed: TypeError"),
        (torch.ones(2), "failed: ValueError"),
        ("best", "failed: ValueError"),
    ],
)
def test_a_value_that_is_no_number_is_refused(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxprune.sensitivity(_network(), IMAGE, lambda _: value)


def test_tensors_and_integers_are_numbers() -> None:
    assert fxprune.sensitivity(_network(), IMAGE, lambda _: torch.tensor(2)).baseline == 2.0  # type: ignore[arg-type, return-value]


def test_without_an_evaluation_the_outputs_are_compared() -> None:
    model, image = _network(), torch.rand(2, 8, 6, 6)
    watched = _Watched(model)
    found = fxprune.sensitivity(model, image)
    watched.assert_untouched()
    assert (found.metric, found.baseline) == ("minus output error", 0.0)
    alone = fxprune.sparsify(model, image, sparsity=0.95, block="1x1", scope="uniform", layers=("0",)).module
    expected, moved = model(image).detach().double(), alone(image).detach().double()
    assert found.layers[0].drop == pytest.approx(float((moved - expected).norm() / expected.norm()))


def test_a_model_in_training_mode_keeps_its_statistics() -> None:
    watched = _Watched(_network().train())
    fxprune.sensitivity(watched.model, torch.rand(2, 8, 6, 6))
    watched.assert_untouched()


def test_a_model_that_is_sparse_already_keeps_its_masks() -> None:
    sparse = fxprune.sparsify(_network(), IMAGE, sparsity="50%", block="1x1").module
    watched = _Watched(sparse)
    found = fxprune.sensitivity(sparse, IMAGE, _total, sparsity="75%")
    watched.assert_untouched()
    assert found.baseline == _total(sparse)
    assert all(row.sparsity >= 0.75 for row in found.layers)


def test_tied_and_parametrised_weights_are_measured_and_kept() -> None:
    model = nn.Sequential(_conv(8, 8), nn.ReLU(), _conv(8, 8), parametrizations.weight_norm(_conv(8, 4)))
    model[2].weight = model[0].weight
    watched = _Watched(model)
    found = fxprune.sensitivity(model, IMAGE, _total)
    watched.assert_untouched()
    assert model[2].weight is model[0].weight
    assert parametrize.is_parametrized(model[3])
    assert [row.layer for row in found.layers] == ["0", "3"]
    assert all(row.sparsity >= 0.95 for row in found.layers)


def test_layers_without_room_for_a_block_are_skipped_with_the_reason() -> None:
    found = fxprune.sensitivity(_network(), IMAGE, _total, block="1x4", layers=("all",))
    assert [(skip.layer, skip.role) for skip in found.skipped] == [("4.up", SE)]
    assert found.skipped[0].reason == "it has fewer channels than a block of 1x4"
    assert "Skipped '4.up' (squeeze-excite): it has fewer channels than a block of 1x4" in found.table()
    assert "4.up" not in [row.layer for row in found.layers]


def test_a_layer_named_like_a_kind_is_measured_alone() -> None:
    model = Net(lambda net, x: net.linear(net.more(x.mean((2, 3)))), linear=nn.Linear(4, 3), more=nn.Linear(8, 4))
    masked = []
    fxprune.sensitivity(model, IMAGE, lambda m: masked.append(set(masked_weights(m))) or 0.0, layers=("linear",))
    assert masked == [set(), {"more.weight"}, {"linear.weight"}]


def test_roles_are_summed_up_by_their_drops() -> None:
    values = iter([10.0, 9.0, 7.0, 4.0, 9.5])
    model = nn.Sequential(_conv(8, 16), _conv(16, 32), _conv(32, 64), _conv(64, 8))
    found = fxprune.sensitivity(model, IMAGE, lambda _: next(values))
    expansion, bottleneck = found.roles
    drops = [1.0, 3.0, 6.0]
    assert (expansion.role, expansion.layers) == (PW, 3)
    assert (expansion.least, expansion.median, expansion.largest) == (min(drops), statistics.median(drops), max(drops))
    assert (bottleneck.least, bottleneck.largest) == (0.5, 0.5)


def test_a_sensitivity_prints_as_tables_and_round_trips_as_json() -> None:
    values = iter([0.75, 0.5, 0.7])

    def accuracy(_: nn.Module) -> float:
        return next(values)

    found = fxprune.sensitivity(_network(), IMAGE, accuracy)
    lines = [line.split() for line in found.table().splitlines()]
    assert ["layer", "role", "sparsity", "accuracy", "drop"] in lines
    assert ["0", "expansion", "95.3%", "0.5000", "0.2500"] in lines
    assert ["bottleneck", "1", "0.0500", "0.0500", "0.0500"] in lines
    assert "accuracy: 0.7500 before pruning; one layer at a time, 95.0% in blocks of 1x1" in found.table()
    assert found.table("github").startswith("| layer")
    assert Sensitivity.from_json(found.json()) == found
    assert json.loads(found.json())["roles"][0]["median"] == 0.25


def test_progress_wraps_the_layers() -> None:
    seen = []

    def progress(layers: Any) -> Any:
        seen.append(len(layers))
        for layer in layers:
            yield layer
            seen.append(layer.name)

    fxprune.sensitivity(_network(), IMAGE, _total, progress=progress)
    assert seen == [2, "0", "3"]


def _integers(net: Any, x: Tensor) -> Tensor:
    return net.a(x).argmax(1)


BAD_INPUT: list[tuple[dict[str, Any], type[UsageError], str]] = [
    ({"sparsity": 1.0}, TargetError, r"sparsity=1.0 is outside \[0, 1\)"),
    ({"sparsity": "much"}, TargetError, "cannot read sparsity='much'"),
    ({"block": "4"}, SpecError, "cannot read the block '4'"),
    ({"block": "1x32"}, TargetError, "no layer can be made sparse"),
    ({"layers": ("conv2x2",)}, SpecError, "no layer matches 'conv2x2'"),
    ({"exclude": ("all",)}, TargetError, "excluded"),
    ({"criterion": "magnitud"}, SpecError, "did you mean 'magnitude'"),
    ({"frontend": "jit"}, UsageError, "unknown front end 'jit'"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD_INPUT, ids=[str(row[0]) for row in BAD_INPUT])
def test_a_mistake_in_the_call_is_told_before_anything_is_evaluated(
    options: dict[str, Any], kind: type[UsageError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        fxprune.sensitivity(_network(), IMAGE, pytest.fail, **options)  # type: ignore[arg-type]


def test_outputs_that_cannot_be_compared_need_an_evaluation() -> None:
    with pytest.raises(InputError, match=r"the outputs on the example inputs have norm 0\.0; give others, or an `eval"):
        fxprune.sensitivity(Net(_integers, a=_conv(8, 4)), IMAGE)
