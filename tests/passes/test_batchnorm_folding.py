from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxprune
from fxprune.graph.passes import Pipeline
from fxprune.runtime.weight_masks import mask_weight, masked_weights
from passes import BatchnormFolding, batchnorm_folding
from tests.laws import assert_close, randomise, run
from tests.passes.nets import Residual, traced

FOLD = Pipeline((BatchnormFolding(),))


def _norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def _folded(model: nn.Module, x: Tensor, left: int) -> None:
    """Fold a model's batch norms and assert every law: `left` of them stay."""
    generator = torch.Generator().manual_seed(0)
    randomise(model.double().eval(), generator)
    x = x.double()
    graph = fxprune.trace(model, x)
    before, state = run(graph, fxprune.Inputs.of(x)), copy.deepcopy(model.state_dict())
    result = FOLD(graph)
    folded = result.graph_module
    assert _norms(folded) == left
    assert all(parameter.requires_grad for parameter in folded.parameters())
    assert result.modified == (left < _norms(graph))
    assert_close(run(folded, fxprune.Inputs.of(x)), before, "folding", 1e-9)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "the model changed"
    again = FOLD(folded)
    assert not again.modified, "folding is not idempotent"
    assert fxprune.dump(again.graph_module) == fxprune.dump(folded)


def test_golden(golden: Callable[[str, str], None]) -> None:
    module = traced(Residual())
    golden("batchnorm_folding_residual", fxprune.diff(module, FOLD(module).graph_module))


@pytest.mark.parametrize(
    ("name", "left"), [("resnet18", 0), ("mobilenet_v2", 0), ("densenet121", 62), ("googlenet", 0)]
)
def test_models(name: str, left: int) -> None:
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    _folded(torchvision.models.get_model(name, **options), torch.rand(1, 3, 64, 64), left)


class Kinds(nn.Module):
    """Linear, grouped, transposed and 1-D layers before batch norms, one without scale and shift."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2, bias=False), nn.BatchNorm1d(8))
        self.up = nn.Sequential(nn.ConvTranspose1d(8, 6, 2, stride=2), nn.BatchNorm1d(6, affine=False))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 12, 5), nn.BatchNorm1d(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(torch.relu(self.line(x))))


class Kept(nn.Module):
    """Batch norms that must stay: two readers, a layer that runs twice, tokens, groups of a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice, self.a = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.run_twice, self.b, self.c = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.tokens, self.d = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.grouped, self.e = nn.ConvTranspose1d(4, 4, 1, groups=2), nn.BatchNorm1d(4)
        self.normed, self.f = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1)), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read_twice(x)
        y = self.a(y) + y
        y = self.c(self.run_twice(self.b(self.run_twice(y))))
        return self.f(self.normed(self.e(self.grouped(self.d(self.tokens(y))))))


def test_kinds_of_layers() -> None:
    _folded(Kinds(), torch.rand(2, 4, 8), 0)


def test_what_must_stay() -> None:
    _folded(Kept(), torch.rand(2, 4, 4), 6)


def test_masks_excuse_nothing() -> None:
    model = Kept()
    for layer in (model.tokens, model.grouped):
        mask_weight([(layer, "weight")], torch.rand(layer.weight.shape) < 0.5)
    _folded(model, torch.rand(2, 4, 4), 6)


def test_training_and_missing_statistics() -> None:
    batch = torch.rand(2, 3, 4, 4)
    training = fxprune.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train(), batch)
    assert not FOLD(training).modified
    _folded(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), batch, 1)


class NormAct(nn.BatchNorm2d):
    """A batch norm with an activation in it, as timm's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Scaled(nn.Conv2d):
    """A convolution that is not only one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


def test_classes_of_their_own_must_stay() -> None:
    _folded(nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4)), torch.rand(1, 3, 4, 4), 1)
    _folded(nn.Sequential(Scaled(3, 4, 1), nn.BatchNorm2d(4)), torch.rand(1, 3, 4, 4), 1)


class Activated(nn.BatchNorm2d):
    """A batch norm with modules in it, as timm's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def test_what_a_batch_norm_holds_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Activated(4), nn.Conv2d(4, 4, 1))
    _folded(model, torch.rand(1, 3, 4, 4), 1)
    monkeypatch.setitem(batchnorm_folding._REST, f"{__name__}.Activated", ("drop", "act"))
    _folded(model, torch.rand(1, 3, 4, 4), 0)
    folded = FOLD(fxprune.trace(model, torch.rand(1, 3, 4, 4).double())).graph_module
    assert isinstance(folded.get_submodule("1"), nn.Hardswish)


def test_batch_norms_of_timm() -> None:
    timm = pytest.importorskip("timm")
    _folded(timm.create_model("efficientnet_b0"), torch.rand(1, 3, 64, 64), 0)


def test_masks_stay_masks() -> None:
    x = torch.rand(1, 3, 64, 64)
    sparse = fxprune.sparsify(torchvision.models.mobilenet_v2().eval(), x, sparsity=0.5).module
    folded = FOLD(fxprune.trace(sparse, x)).graph_module
    assert masked_weights(folded).keys() == masked_weights(sparse).keys()
    for name, mask in masked_weights(folded).items():
        weight: Tensor = folded.get_submodule(name.removesuffix(".weight")).weight  # type: ignore[assignment]
        assert not weight[~mask.mask].any()
    assert_close(folded(x), sparse(x), "folding", 1e-4)
