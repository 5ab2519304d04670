"""Trained models with real images, and images to train on, from the folder that `--data` names.

DIR holds `real_data.py`, which gives the models and images, and the files that it reads.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = [
    "BATCH",
    "Case",
    "augmented",
    "batches",
    "cifar_case",
    "imagenet_case",
    "load_source",
    "top1",
    "training_data",
]

BATCH = 25
"""Images a batch: more would not fit the caches, fewer would feed a batch norm too few."""


@dataclass(frozen=True)
class Case:
    """A trained model with its images.

    Attributes:
        title: names both.
        model: in eval mode.
        seen: images uint8 [N, H, W, 3] and labels int64 [N] for criteria and batch-norm statistics.
        tested: images and labels that accuracy is measured on.
        normalize: images → the model's input.
        note: which images these are.
    """

    title: str
    model: nn.Module
    seen: tuple[np.ndarray, np.ndarray]
    tested: tuple[np.ndarray, np.ndarray]
    normalize: Callable[[np.ndarray], Tensor]
    note: str

    @property
    def example(self) -> Tensor:
        """One image as the model takes it."""
        return self.normalize(self.tested[0][:1])


def load_source(folder: Path) -> ModuleType:
    """Import `real_data.py` of a folder."""
    path = folder / "real_data.py"
    if not path.is_file():
        raise SystemExit(f"{folder} holds no real_data.py; give --data the folder of the weights and images")
    spec = importlib.util.spec_from_file_location("real_data", path)
    assert spec is not None
    assert spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    return source


def cifar_case(source: ModuleType, depth: int, limit: int, seen: int) -> Case:
    """Return a CIFAR-10 ResNet: tested on the first test images, training images for the rest."""
    images, labels = source.cifar10("train20k")
    test_images, test_labels = source.cifar10("test")
    tested = test_images[:limit], test_labels[:limit]
    note = f"{len(tested[0]):,} of the 10,000 test images; criteria and statistics see {seen} training images"
    return Case(
        f"ResNet-{depth} on CIFAR-10",
        source.cifar_resnet(depth, pretrained=True),
        (images[:seen], labels[:seen]),
        tested,
        source.normalize_cifar,
        note,
    )


def imagenet_case(source: ModuleType, limit: int, seen: int) -> Case:
    """Return MobileNetV2: one half of the sample is tested, the other half is for the rest."""
    images, labels = source.imagenet_sample()
    odd, even = slice(1, 2 * seen, 2), slice(0, 2 * limit, 2)
    tested = images[even], labels[even]
    note = (
        f"{len(tested[0])} images of the {len(images)} of the sample; criteria and statistics see "
        f"{len(labels[odd])} others (one image a class: no class is in both)"
    )
    return Case(
        "MobileNetV2 on ImageNet",
        source.imagenet_mobilenet_v2(),
        (images[odd], labels[odd]),
        tested,
        source.normalize_imagenet,
        note,
    )


def batches(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (input, labels) of the images that criteria may see."""
    images, labels = case.seen
    for i in range(0, len(images), BATCH):
        yield case.normalize(images[i : i + BATCH]), torch.from_numpy(labels[i : i + BATCH])


def augmented(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join images float [3, 32, 32] to a batch, each shifted by up to 4 pixels and mirrored at random."""
    images, labels = (torch.stack(part) for part in zip(*samples, strict=True))
    count, channels, height, width = images.shape
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    down, right = torch.randint(0, 9, (2, count, 1, 1, 1))
    rows = down + torch.arange(height).view(1, 1, -1, 1)
    columns = right + torch.arange(width).view(1, 1, 1, -1)
    mirrored = torch.rand(count, 1, 1, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(3), columns)
    which = torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1)
    return padded[which[0], which[1], rows, columns], labels


@functools.cache
def training_data(source: ModuleType, batch_size: int = 128) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return 20,000 CIFAR-10 training images, augmented, and 1,000 others to validate on."""
    images, labels = source.cifar10("train")
    inputs, targets = source.normalize_cifar(images[:20000]), torch.from_numpy(labels[:20000])
    held = TensorDataset(source.normalize_cifar(images[-1000:]), torch.from_numpy(labels[-1000:]))
    seen = DataLoader(TensorDataset(inputs, targets), batch_size, shuffle=True, drop_last=True, collate_fn=augmented)
    return seen, DataLoader(held, 250)


@torch.no_grad()
def top1(case: Case, module: nn.Module) -> float:
    """Top-1 accuracy in percent."""
    images, labels = case.tested
    hits = 0
    for i in range(0, len(images), BATCH):
        found = module(case.normalize(images[i : i + BATCH])).argmax(1).numpy()
        hits += int((found == labels[i : i + BATCH]).sum())
    return 100 * hits / len(images)
