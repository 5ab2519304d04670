"""A network with every kind of layer, thresholds on all of them, and a task to train it on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from fxprune.runtime.thresholds import LearnedThreshold
from fxprune.training import History, Hook, Moment, Training, classification, cross_entropy, train
from fxprune.training.learned_thresholds import LearnedThresholds, attach_thresholds

Batches = list[tuple[Tensor, Tensor]]

PRUNED = (("conv", "weight"), ("depthwise", "weight"), ("squeeze", "weight"), ("excite", "weight"), ("head", "weight"))
SETTINGS = Training(epochs=4, learning_rate=0.05, schedule="constant", tolerance=None, keep_best=False)


class Net(nn.Module):
    """Every kind of layer: batch-normalised or not, depthwise, squeeze-and-excite, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.depthwise(functional.relu(self.norm(self.conv(x)))))
        scale = self.excite(functional.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head((x * scale).mean((2, 3)))


def thresholded(layers: Iterable[tuple[str, str]] = PRUNED, **options: Any) -> Net:
    torch.manual_seed(0)
    model = Net()
    attach_thresholds(model, layers, **options)
    return model


def batches(count: int = 8) -> Batches:
    """Stripes of four orientations in noise."""
    generator = torch.Generator().manual_seed(1)
    stripes = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0]).expand(8, 8)
    kinds = torch.stack([stripes, stripes.T, stripes * stripes.T, torch.zeros(8, 8)])[:, None]
    found = []
    for _ in range(count):
        labels = torch.randint(0, 4, (32,), generator=generator)
        found.append((kinds[labels] + 0.5 * torch.randn(32, 1, 8, 8, generator=generator), labels))
    return found


def thresholds(module: nn.Module) -> dict[str, LearnedThreshold]:
    return {name: part for name, part in module.named_modules() if isinstance(part, LearnedThreshold)}


def raise_thresholds(module: nn.Module, fraction: float) -> None:
    """Set every threshold so that hard pruning zeroes this fraction of its tensor."""
    for owner in module.modules():
        if parametrize.is_parametrized(owner):
            for chain in owner.parametrizations.values():
                chain[0].threshold.data.copy_(chain.original.detach().square().quantile(fraction))


def moment(step: int, measure: Callable[[], dict[str, float]], epoch: int = 1) -> Moment:
    return Moment(epoch, step, 100, measure)


def run(
    folder: Path, *more: Hook, resumable: Path | None = None, **options: Any
) -> tuple[Net, LearnedThresholds, History]:
    """Train with a trace in `folder`; `resumable` is the folder of the run itself."""
    model, data = thresholded(), batches()
    hook = LearnedThresholds(folder, **{"regularization": 3e-3, "threshold_rate": 1e-4, **options})
    history = train(
        model,
        data,
        cross_entropy,
        SETTINGS,
        validation=data[:2],
        measure=classification,
        hooks=[hook, *more],
        folder=resumable,
        progress=False,
    )
    return model, hook, history
