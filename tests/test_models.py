"""The laws on real architectures: half of the multiply-accumulates leave, exactly (issue: the core's main job)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune.graph.passes import Pipeline
from fxprune.plan import write_masks
from passes import MaskInsertion
from tests.laws import assert_close, assert_laws, randomise

SIZES = {"inception_v3": 299, "alexnet": 128, "vgg16_bn": 64, "squeezenet1_1": 96}

OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "fcn_resnet50": {"weights_backbone": None, "aux_loss": True},
    "deeplabv3_mobilenet_v3_large": {"weights_backbone": None, "aux_loss": True},
    "lraspp_mobilenet_v3_large": {"weights_backbone": None},
}

MODELS = (
    *("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "mobilenet_v2"),
    *("mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s", "mnasnet1_0", "shufflenet_v2_x1_0"),
    *("squeezenet1_1", "regnet_y_400mf", "vgg16_bn", "alexnet", *OPTIONS),
)


class Shortcut(nn.Module):
    """Option A of He et al. 2015: subsample, and pad the new channels with zeros."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class Block(nn.Module):
    def __init__(self, inputs: int, planes: int) -> None:
        super().__init__()
        stride = planes // inputs
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Identity() if stride == 1 else Shortcut(planes // 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def cifar_resnet(depth: int) -> nn.Module:
    """A CIFAR ResNet with zero-padded shortcuts."""
    blocks = (depth - 2) // 6
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = [16, *[16] * blocks, *[32] * blocks, *[64] * (blocks - 1)]
    planes = [*[16] * blocks, *[32] * blocks, *[64] * blocks]
    body = [Block(i, p) for i, p in zip(inputs, planes, strict=True)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def build(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name.startswith("cifar"):
        return cifar_resnet(int(name.removeprefix("cifar_resnet"))).eval(), torch.randn(2, 3, 32, 32)
    size = SIZES.get(name, 64)
    model = torchvision.models.get_model(name, weights=None, **OPTIONS.get(name, {}) | options).eval()
    return model, torch.randn(2, 3, size, size)


def macs(module: nn.Module, x: Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", [*MODELS, "cifar_resnet20", "cifar_resnet56"])
def test_half_of_the_macs_leave_exactly(name: str) -> None:
    model, x = build(name)
    randomise(model.double(), torch.Generator().manual_seed(0))
    x = x.double()
    result = fxprune.prune(model, x, macs="50%")
    masked = Pipeline((MaskInsertion(),))(fxprune.trace(model, x)).graph_module
    assert result.report.macs == (macs(masked, x), macs(result.module, x))
    assert 0.495 <= result.report.macs[1] / result.report.macs[0] <= 0.5
    assert result.report.parameters[1] == sum(p.numel() for p in result.module.parameters())
    write_masks(masked, result.plan)
    with torch.no_grad():
        assert_close(result.module(x), masked(x), "exactness")
        assert not torch.equal(_first(result.module(x)), _first(model(x)))


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output.values()))


@pytest.mark.parametrize("name", ["shufflenet_v2_x1_0", "regnet_y_400mf", "cifar_resnet20"])
def test_laws(name: str) -> None:
    assert_laws(*build(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "cifar_resnet56"])
def test_all_laws_on_every_model(name: str) -> None:
    assert_laws(*build(name))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_cut_with_the_rest(name: str) -> None:
    model, x = build(name, aux_logits=True)
    slim = fxprune.prune(model, x, macs="50%").module
    assert isinstance(slim(x), Tensor)
    outputs = slim.train()(x)
    assert type(outputs).__name__ in ("GoogLeNetOutputs", "InceptionOutputs")
    assert all(part.shape == (2, 1000) for part in outputs)
    sum(part.square().mean() for part in outputs).backward()
    assert all(p.grad is not None for p in slim.parameters())


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_without_auxiliary_heads(name: str) -> None:
    model, x = build(name, aux_logits=False)
    slim = fxprune.prune(model, x, macs="50%").module
    assert isinstance(slim.train()(x), Tensor)
    assert not any("aux" in n.lower() for n, _ in slim.named_parameters())


def test_stochastic_depth_and_dropout_obey_the_mode() -> None:
    model, x = build("efficientnet_b0")
    slim = fxprune.prune(model, x, macs="60%").module
    with torch.no_grad():
        assert torch.equal(slim(x), slim(x))
        slim.train()
        assert not torch.equal(slim(x), slim(x))


def test_where_half_needs_an_approximation_the_report_says_so() -> None:
    torch.manual_seed(0)
    model = torchvision.models.convnext_tiny(weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(fxprune.errors.TargetError, match=r"minimum is .*allow_statistical"):
        fxprune.prune(model, x, macs="1%")
    exact = fxprune.prune(model, x, macs="50%")
    assert not any("approximate" in note for note in exact.report.notes)
    result = fxprune.prune(model, x, macs="30%", allow_statistical=True)
    assert any("approximate" in note for note in result.report.notes)
    assert result.module(x).shape == (1, 1000)
    assert any(row.state == "statistical" for row in result.report.layers)
