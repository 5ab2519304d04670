from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import SpecError
from fxprune.graph.passes import Pipeline
from fxprune.runtime.weight_masks import mask_weight, masked_weights
from passes import BatchnormFolding, Conv1x1ToLinear
from tests.laws import assert_close, randomise, run

LOWER = Pipeline((Conv1x1ToLinear(),))


def _changes(module: fx.GraphModule) -> int:
    return sum(node.target in ("permute", "flatten", "unflatten") for node in module.graph.nodes)


def _pointwise_convolutions(module: nn.Module) -> int:
    return sum(isinstance(part, nn.Conv2d) and set(part.kernel_size) == {1} for part in module.modules())


def _lowered(model: nn.Module, *inputs: Tensor, fold: bool = True) -> fx.GraphModule:
    """Lower a model and assert every law on all inputs, of which the first is the example."""
    randomise(model.double().eval(), torch.Generator().manual_seed(0))
    graph = fxprune.trace(model, inputs[0].double())
    if fold:
        graph = Pipeline((BatchnormFolding(),))(graph).graph_module
    state = copy.deepcopy(graph.state_dict())
    result = LOWER(graph)
    assert result.modified
    for x in inputs:
        ours = fxprune.Inputs.of(x.double())
        assert_close(run(result.graph_module, ours), run(graph, ours), "lowering", 1e-9)
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items()), "the input changed"
    assert not LOWER(result.graph_module).modified, "lowering is not idempotent"
    return result.graph_module


class Block(nn.Module):
    """A strided 1×1 convolution, an inverted residual with squeeze-excitation, and a head after the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1, stride=2)
        self.expand, self.act = nn.Conv2d(8, 16, 1), nn.ReLU(inplace=True)
        self.spatial = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.reduce, self.gate = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project = nn.Conv2d(16, 8, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        y = self.spatial(self.act(self.expand(x)))
        y = y * torch.sigmoid(self.gate(torch.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        x = x + self.project(y)
        return self.head(self.pool(x)).flatten(1)


def test_golden(golden: Callable[[str, str], None]) -> None:
    torch.manual_seed(0)
    module = fxprune.trace(Block().eval(), torch.rand(1, 3, 8, 8))
    golden("conv1x1_to_linear_block", fxprune.diff(module, LOWER(module).graph_module))


def test_other_batches_and_sizes() -> None:
    lowered = _lowered(Block(), torch.rand(1, 3, 8, 8), torch.rand(3, 3, 11, 7), torch.rand(2, 3, 2, 2))
    assert _pointwise_convolutions(lowered) == 0


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "resnet50"])
def test_models(name: str) -> None:
    model = torchvision.models.get_model(name)
    lowered = _lowered(model, torch.rand(1, 3, 64, 64), torch.rand(2, 3, 96, 80))
    assert _pointwise_convolutions(lowered) == 0
    channels_last = torch.rand(1, 3, 64, 64).double().to(memory_format=torch.channels_last)
    assert_close(lowered(channels_last), lowered(channels_last.contiguous()), "channels last", 1e-12)


def test_adjacent_changes_of_layout_cancel() -> None:
    chain = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Hardswish(), nn.Conv2d(8, 4, 1))
    assert _changes(_lowered(chain, torch.rand(2, 4, 5, 5))) == 2

    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y += self.b(y)
            return self.c(torch.relu(y)) + y

    assert _changes(_lowered(Join(), torch.rand(2, 4, 5, 5))) == 2


def test_maps_of_one_position_need_no_permute() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1))
    lowered = _lowered(model, torch.rand(2, 4, 5, 5))
    assert "permute" not in [node.target for node in lowered.graph.nodes]


def test_a_mean_of_everything_is_no_pool() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x - torch.mean(x, dim=None, keepdim=True))

    _lowered(Centred(), torch.rand(2, 4, 5, 5))


def test_an_example_of_one_position_is_no_vector() -> None:
    _lowered(nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU()), torch.rand(2, 4, 1, 1), torch.rand(2, 4, 3, 5))


class Viewed(nn.Module):
    """Flattens maps by views, which need their positions side by side, behind a layer and behind a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.act(self.conv(x))
        pooled = nn.functional.max_pool2d(y, 2)
        rows = pooled.view(x.size(0), -1)
        shuffled = y.view(x.size(0), 2, 2, *y.shape[2:]).transpose(1, 2)
        shuffled.view(torch.int64).view(shuffled.shape)  # of another dtype, which no reshape gives
        return y.view(x.size(0), -1), rows.view_as(rows), shuffled


def test_views_copy_where_they_must() -> None:
    _lowered(Viewed(), torch.randn(1, 3, 6, 4), torch.randn(3, 3, 5, 7))


def test_lines_and_volumes() -> None:
    _lowered(nn.Sequential(nn.Conv1d(4, 2, 1, stride=2), nn.ReLU()), torch.rand(2, 4, 6))
    _lowered(nn.Sequential(nn.Conv3d(4, 2, 1, stride=(1, 2, 1))), torch.rand(2, 4, 3, 4, 5))


class Own(nn.Conv2d):
    """A convolution that is not only one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


class Kept(nn.Module):
    """Convolutions that must stay: grouped, padded, with a computed weight, tied, of its own class, without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.padded = nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.b.weight = self.a.weight
        self.own, self.single, self.shifted = Own(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        mask_weight([(self.shifted, "bias")], torch.tensor([True, False, True, False]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(self.shifted(self.b(self.a(self.normed(self.padded(self.grouped(x)))))))
        return self.single(x[0])


def test_what_must_stay() -> None:
    graph = fxprune.trace(Kept().eval(), torch.rand(1, 4, 5, 5))
    assert not LOWER(graph).modified


def test_masks_stay_masks() -> None:
    x = torch.rand(1, 3, 64, 64)
    sparse = fxprune.sparsify(torchvision.models.mobilenet_v2().eval(), x, sparsity=0.5).module
    graph = Pipeline((BatchnormFolding(), Conv1x1ToLinear()))(fxprune.trace(sparse, x)).graph_module
    assert masked_weights(graph).keys() == masked_weights(sparse).keys()
    assert_close(graph(x), sparse(x), "lowering", 1e-4)
    layer = graph.get_submodule("features.2.conv.0.0")
    assert isinstance(layer, nn.Linear)
    assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2


WITH_IM2COL = Pipeline((Conv1x1ToLinear(im2col=("*",)),))


class Kernels(nn.Module):
    """Convolutions that become linear layers on patches, and some that must not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.wide = nn.Conv2d(8, 8, (1, 5), padding="same", dilation=2)
        self.padded = nn.Conv2d(8, 6, 1, padding=1)
        self.grouped, self.reflecting = (
            nn.Conv2d(6, 6, 3, groups=2),
            nn.Conv2d(6, 6, 3, padding_mode="reflect", padding=1),
        )
        self.uneven = nn.Conv2d(6, 4, 2, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.stem(x))) + 1)
        return self.uneven(self.reflecting(self.grouped(self.padded(x))))


def test_convolutions_become_linear_layers_on_patches() -> None:
    model = Kernels().double()
    graph = fxprune.trace(model, torch.rand(2, 3, 17, 20).double())
    result = WITH_IM2COL(graph)
    assert result.modified
    assert not WITH_IM2COL(result.graph_module).modified
    for size in ((2, 17, 20), (1, 31, 9)):
        x = torch.rand(size[0], 3, *size[1:]).double()
        assert_close(run(result.graph_module, fxprune.Inputs.of(x)), run(graph, fxprune.Inputs.of(x)), "im2col", 1e-9)
    kinds = {name: type(part).__name__ for name, part in result.graph_module.named_children()}
    assert {kinds[name] for name in ("stem", "wide", "padded")} == {"Linear"}
    assert {kinds[name] for name in ("grouped", "reflecting", "uneven")} == {"Conv2d"}


def test_im2col_takes_only_what_is_named() -> None:
    graph = fxprune.trace(Kernels(), torch.rand(1, 3, 17, 20))
    lowered = Pipeline((Conv1x1ToLinear(im2col=("stem",)),))(graph).graph_module
    assert [name for name, part in lowered.named_children() if isinstance(part, nn.Linear)] == ["stem"]
    with pytest.raises(SpecError, match="no layer matches 'stm'; did you mean 'stem'"):
        Pipeline((Conv1x1ToLinear(im2col=("stm",)),))(graph)


def test_blocks_of_zeros_stay_blocks_on_patches() -> None:
    sparse = fxprune.sparsify(nn.Sequential(nn.Conv2d(8, 8, 3)), torch.rand(1, 8, 9, 9), sparsity=0.5, layers="all")
    lowered = fxprune.finalize(WITH_IM2COL(sparse.module).graph_module)
    blocks = lowered.get_parameter("0.weight").unflatten(1, (-1, 4))
    assert (blocks != 0).any(2).float().mean() == 0.5
