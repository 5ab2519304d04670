"""Bad input: one clear message each, and the model unchanged. Half precision and other devices are no mistake."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

import fxprune
from fxprune.errors import InputError, SpecError, TargetError, TraceError, UsageError

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions, a batch norm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(image)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


class WithLayerNorm(nn.Module):
    """All channels share the statistics of a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 32)
        self.norm = nn.LayerNorm(32)
        self.last = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def _state(model: nn.Module) -> dict[str, Any]:
    facts: dict[str, Any] = {f"training of {name}": part.training for name, part in model.named_modules()}
    for name, parameter in model.named_parameters():
        facts[f"gradient of {name}"] = (parameter.requires_grad, parameter.grad)
    return facts | copy.deepcopy(model.state_dict())


def _assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = _state(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(after[name].nan_to_num(), value.nan_to_num()) if isinstance(value, Tensor) else None
        assert same if isinstance(value, Tensor) else after[name] == value, f"'{name}' changed"


def _assert_refused(kind: type[UsageError], message: str, model: nn.Module, inputs: Any, **options: Any) -> None:
    before = _state(model)
    with pytest.raises(kind, match=message) as caught:
        fxprune.prune(model, inputs, **options)
    assert "\n" not in str(caught.value), "an error is one line"
    _assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X, X), r"too many positional arguments; it is called as forward\(image"),
        ({"picture": X}, r"called as forward\(image"),
        ((), r"hold no tensor"),
        ("image", r"example inputs of type str"),
        ((3,), r"hold no tensor"),
    ],
)
def test_other_inputs_than_the_model_takes(net: nn.Module, inputs: Any, message: str) -> None:
    _assert_refused(InputError, message, net, inputs, macs="50%")


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3), (8, 8)])
def test_inputs_of_another_shape(net: nn.Module, shape: tuple[int, ...]) -> None:
    _assert_refused(UsageError, "channels|dimension|size|shape", net, torch.rand(shape), macs="50%")


def test_training_mode_with_batch_1_names_the_remedy() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()
    _assert_refused(UsageError, r"training.*(batch|eval)|batch.*eval", model, torch.rand(1, 6), macs="50%")


def test_training_mode_with_batch_2_works() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()
    before = _state(model)
    result = fxprune.prune(model, torch.rand(2, 6), ratio=0.5)
    assert result.report.parameters[1] < result.report.parameters[0]
    _assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": "150%"}, r"macs=150% is more than the model has"),
        ({"macs": 1e15}, r"more than the model has"),
        ({"macs": 0}, r"not positive"),
        ({"macs": "-5%"}, r"not positive"),
        ({"parameters": "101%"}, r"more than the model has"),
        ({"macs": "half"}, r"cannot read macs='half'"),
        ({"ratio": 1.0}, r"outside \[0, 1\)"),
        ({"ratio": -0.1}, r"outside \[0, 1\)"),
        ({"ratio": "lots"}, r"cannot read ratio='lots'"),
        ({}, r"exactly one target of ratio, macs, parameters; got none"),
        ({"macs": 0.5, "ratio": 0.5}, r"got ratio, macs"),
        ({"macs": 0.5, "round_to": 0}, r"round_to \(0\)"),
        ({"macs": 0.5, "min_width": 0}, r"min_width \(0\)"),
        ({"macs": 0.5, "max_ratio": 1.5}, r"max_ratio is 1\.5"),
    ],
)
def test_a_target_that_means_nothing(net: nn.Module, options: dict[str, Any], message: str) -> None:
    _assert_refused(TargetError, message, net, X, **options)


def test_an_unreachable_target_states_the_minimum(net: nn.Module) -> None:
    _assert_refused(TargetError, r"the minimum is [\d,]+ \(\d+\.\d% of", net, X, macs="20%", min_width=7)


def test_an_unreachable_target_names_what_pins_the_rest() -> None:
    model = WithLayerNorm().eval()
    _assert_refused(TargetError, r"layer_norm.*allow_statistical", model, torch.rand(2, 6), macs="50%")
    assert fxprune.prune(model, torch.rand(2, 6), macs="50%", allow_statistical=True).report.notes


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_an_unknown_layer_is_answered_with_the_nearest(net: nn.Module, option: str) -> None:
    _assert_refused(
        SpecError, r"no layer matches 'conv11'; did you mean 'conv1'", net, X, macs="50%", **{option: ["conv11"]}
    )


def test_a_ratio_for_an_unknown_layer_is_answered_with_the_nearest(net: nn.Module) -> None:
    _assert_refused(SpecError, r"did you mean 'conv2'", net, X, ratio={"conv22": 0.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "l3"}, r"unknown criterion 'l3'; did you mean 'l[12]'"),
        ({"scope": "locally"}, r"unknown scope 'locally'"),
        ({"criterion": lambda subject: torch.zeros(subject.orbit.width + 1)}, r"\(9,\).*8 classes"),
    ],
)
def test_a_criterion_or_scope_that_does_not_exist(net: nn.Module, options: dict[str, Any], message: str) -> None:
    _assert_refused(SpecError, message, net, X, macs="50%", **options)


def test_taylor_needs_data(net: nn.Module) -> None:
    _assert_refused(
        InputError, r"'taylor' needs data: give batches=… and loss=…", net, X, macs="50%", criterion="taylor"
    )


@pytest.mark.parametrize("half", [{"batches": [X]}, {"loss": lambda module, batch: module(batch).sum()}])
def test_data_without_loss_or_loss_without_data_is_no_evidence(net: nn.Module, half: dict[str, Any]) -> None:
    _assert_refused(InputError, r"batches=… and loss=…", net, X, macs="50%", criterion="taylor", **half)


def _quantised(net: nn.Module) -> nn.Module:
    return quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)


def _scripted(net: nn.Module) -> nn.Module:
    return torch.jit.script(net)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(("make", "message"), [(_quantised, "module 'fc' is quantised"), (_scripted, "is TorchScript")])
def test_a_model_that_is_no_floating_point_eager_module(
    net: nn.Module, make: Callable[[nn.Module], nn.Module], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fxprune.prune(make(net), X, macs="50%")


def test_a_compiled_model_names_the_remedy(net: nn.Module) -> None:
    compiled = cast(nn.Module, torch.compile(net))
    with pytest.raises(InputError, match="give the module that was compiled"):
        fxprune.prune(compiled, X, macs="50%")


def test_a_lazy_module_names_the_remedy() -> None:
    with pytest.raises(InputError, match=r"'0\.weight' has no shape yet; call the model once"):
        fxprune.prune(nn.Sequential(nn.LazyConv2d(8, 1)), X, macs="50%")


def test_one_pattern_needs_no_list(net: nn.Module) -> None:
    one, several = (fxprune.prune(net, X, ratio=0.5, exclude=given) for given in ("fc", ["fc"]))
    assert one.plan.orbits == several.plan.orbits


def test_a_model_without_parameters_has_nothing_to_reach() -> None:
    with pytest.raises(UsageError):
        fxprune.prune(nn.ReLU(), X, macs="50%")


def test_inputs_on_another_device(net: nn.Module) -> None:
    _assert_refused(InputError, r"inputs are on meta but the model is on cpu; move one", net, X.to("meta"), macs="50%")


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm", "bn-scale", "random"])
def test_nan_weights(net: nn.Module, criterion: str) -> None:
    with torch.no_grad():
        net.get_parameter("conv2.weight")[3, 1] = torch.nan
    _assert_refused(InputError, r"'conv2\.weight' holds NaN", net, X, macs="50%", criterion=criterion)


def test_an_unknown_front_end(net: nn.Module) -> None:
    _assert_refused(TraceError, r"unknown front end 'exprot'", net, X, macs="50%", frontend="exprot")


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if y.sum() > 0 else -y


def test_a_model_that_no_front_end_traces_gives_every_reason() -> None:
    _assert_refused(
        TraceError,
        r"the symbolic front end .*control flow.* \| the export front end ",
        _Branches().eval(),
        X,
        macs="50%",
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("chanel-surgery", r"unknown pass 'chanel-surgery'; did you mean 'channel-surgery'"),
        ("channel-selection{mcas=50%}", r"no option 'mcas'; did you mean 'macs'"),
        ("mask-insertion channel-surgery", r"cannot read the pass spec"),
        ("", r"the pass spec is empty"),
        ("channel-selection{macs=50%}", r"run mask-insertion before"),
    ],
)
def test_a_wrong_pass_spec(net: nn.Module, spec: str, message: str) -> None:
    before = _state(net)
    with pytest.raises(UsageError, match=message):
        fxprune.run_passes(net, X, spec)
    _assert_unchanged(net, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["l2", "fpgm"])
def test_half_precision_works(net: nn.Module, dtype: torch.dtype, criterion: str) -> None:
    result = fxprune.prune(net.to(dtype), X.to(dtype), macs="50%", criterion=criterion)
    assert all(p.dtype == dtype for p in result.module.parameters())
    output = result.module(X.to(dtype))
    assert output.dtype == dtype
    assert output.isfinite().all()


def test_a_model_on_another_device_stays_there() -> None:
    with torch.device("meta"):
        model = Net().eval()
    graph = fxprune.trace(model, X.to("meta"))
    assert len(fxprune.find_orbits(graph)) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_works(net: nn.Module) -> None:
    result = fxprune.prune(net.cuda(), X.cuda(), macs="50%")
    assert all(p.is_cuda for p in result.module.parameters())
    assert result.module(X.cuda()).is_cuda


@pytest.mark.parametrize("batches", [[], iter(())])
def test_recalibration_without_a_batch(net: nn.Module, batches: Any) -> None:
    net.get_buffer("bn1.running_mean").fill_(3)
    before = _state(net)
    with pytest.raises(InputError, match="at least one batch"):
        fxprune.recalibrate_batchnorm(net, batches)
    _assert_unchanged(net, before)
