"""Exactness and prediction on public architectures: twelve small ones here, forty more with `pytest -m slow`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from benchmarks.laws import check_laws
from benchmarks.suites import inputs_for_laws, is_data_dependent, small_detector
from fxprune import Inputs

Built = tuple[nn.Module, Inputs]

FELT = 1e-3
"""Masks that change the outputs less than this would prove nothing."""


def torchvision_model(name: str, *shape: int, inputs: int = 1, **options: object) -> Callable[[], Built]:
    """Return a builder of a torchvision model and of inputs of one shape."""

    def build() -> Built:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None, **options)
        return model.eval(), Inputs(tuple(torch.rand(shape) for _ in range(inputs)))

    return build


QUICK: dict[str, Callable[[], Built]] = {
    "convnext_tiny": torchvision_model("convnext_tiny", 1, 3, 64, 64),
    "deeplabv3_resnet50": torchvision_model("deeplabv3_resnet50", 1, 3, 64, 64, weights_backbone=None),
    "densenet121": torchvision_model("densenet121", 1, 3, 64, 64),
    "fasterrcnn": lambda: small_detector("fasterrcnn_mobilenet_v3_large_320_fpn"),
    "googlenet": torchvision_model("googlenet", 1, 3, 64, 64, init_weights=False),
    "r2plus1d_18": torchvision_model("r2plus1d_18", 1, 3, 4, 32, 32),
    "raft_small": torchvision_model("raft_small", 1, 3, 128, 128, inputs=2),
    "shufflenet_v2_x0_5": torchvision_model("shufflenet_v2_x0_5", 1, 3, 64, 64),
    "ssdlite": lambda: small_detector("ssdlite320_mobilenet_v3_large"),
    "swin_t": torchvision_model("swin_t", 1, 3, 64, 64),
    "swin_v2_t": torchvision_model("swin_v2_t", 1, 3, 64, 64),
    "vit_b_16": torchvision_model("vit_b_16", 1, 3, 32, 32, image_size=32),
}


@pytest.mark.parametrize("name", QUICK)
def test_quick(name: str) -> None:
    model, inputs = QUICK[name]()
    _assert_lawful(model, inputs, counted=name not in ("fasterrcnn", "ssdlite"))


SLOW = {
    "torchvision": (
        *("fcos_resnet50_fpn", "keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2"),
        *("ssd300_vgg16", "fcn_resnet101", "inception_v3", "lraspp_mobilenet_v3_large", "maxvit_t", "mvit_v2_s"),
        *("s3d", "swin3d_t", "mc3_18", "raft_large", "regnet_y_400mf", "wide_resnet50_2"),
    ),
    "timm": (
        *("beit_base_patch16_224", "cait_xxs24_224", "convnext_zepto_rms", "cs3darknet_focus_s", "edgenext_xx_small"),
        *("efficientformerv2_s0", "efficientvit_m0", "fastvit_t8", "gmlp_ti16_224", "halonet_h1", "hrnet_w18_small"),
        *("levit_128s", "mobilevit_xxs", "nf_regnet_b0", "res2next50", "swinv2_cr_tiny_224"),
        *("tnt_s_legacy_patch16_224", "vit_tiny_patch16_dinov3_qkvb", "xcit_nano_12_p8_224"),
    ),
    "transformers": ("convnext", "detr", "segformer", "swin", "vit"),
}
"""Suite → models, each at the size that `benchmarks.suites` finds for it."""


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "name"), [(suite, name) for suite, names in SLOW.items() for name in names])
def test_slow(suite: str, name: str) -> None:
    if suite != "torchvision":
        pytest.importorskip(suite, reason=f"{suite} is in the extra 'bench'")
    torch.manual_seed(0)
    model, inputs = inputs_for_laws(suite, name, float("inf"))
    _assert_lawful(model, inputs, counted=not is_data_dependent(suite, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext", "segformer", "swin", "vit"])
def test_export(name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is in the extra 'bench'")
    torch.manual_seed(0)
    model, inputs = inputs_for_laws("transformers", name, float("inf"))
    _assert_lawful(model, inputs, counted=True, frontend="export")


def _assert_lawful(model: nn.Module, inputs: Inputs, *, counted: bool, frontend: str = "auto") -> None:
    laws = check_laws(model, inputs, counted=counted, frontend=frontend)
    assert laws.masked > FELT, "the masks changed nothing"
