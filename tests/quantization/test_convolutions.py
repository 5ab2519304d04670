"""Convolutions that stay in float, each for another reason."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import fxprune
from fxprune.graph.passes import Pipeline
from fxprune.quantization import float_layers
from passes import Quantization
from tests.quantization.nets import depthwise, images, unit_ranges


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (0, 1, 0, 1)))


CONVOLUTIONS = {
    "grouped": (nn.Conv2d(8, 8, 3, groups=4), "no rule says how a Conv2d in groups computes on uint8$"),
    "multiplied": (nn.Conv2d(8, 16, 3, groups=8), "no rule says how a Conv2d in groups computes on uint8$"),
    "dense": (nn.Conv2d(8, 8, 3), "computes on uint8; im2col makes it a linear layer"),
    "circular": (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "computes on uint8$"),
    "transposed": (nn.ConvTranspose2d(8, 8, 3, groups=8), "a ConvTranspose2d in groups computes on uint8$"),
    "reflecting": (depthwise(8, padding_mode="reflect"), "it pads with 'reflect', and only zeros are levels"),
    "one-sided": (depthwise(8, 4, padding="same", dilation=1), "it pads more on one side than on the other"),
    "own": (Padded(8, 8, 3, groups=8), "its class Padded computes may be more than a depthwise convolution"),
    "doubled": (depthwise(8).double(), "its weight is float64, and only float32"),
    "computed": (parametrizations.weight_norm(depthwise(8)), "its weight is computed by a parametrisation"),
}


@pytest.mark.filterwarnings("ignore:Using padding=")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_that_stay_in_float_say_why(name: str) -> None:
    layer, reason = CONVOLUTIONS[name]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layer)
    dtype = layer.weight.dtype
    graph = images(model.to(dtype), torch.randn(2, 3, 9, 9, dtype=dtype))
    module = Pipeline((Quantization(ranges=unit_ranges(graph)),))(graph).graph_module
    reasons = dict(float_layers(module))
    assert re.search(reason, reasons["1"]), reasons


def test_one_image_without_its_batch_stays_in_float() -> None:
    graph = fxprune.trace(nn.Sequential(depthwise(3)).eval(), torch.randn(3, 9, 9))
    module = Pipeline((Quantization(ranges=unit_ranges(graph)),))(graph).graph_module
    assert [reason for _, reason in float_layers(module)] == ["its input is not known to have 4 dimensions"]
