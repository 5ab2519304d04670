"""Two small networks that predict every pixel, and the images that they are trained on, drawn from a seed."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.jobs import count_macs
from fxprune import Inputs
from fxprune.training.objectives import Loss, cross_entropy

__all__ = [
    "TASKS",
    "Denoiser",
    "Task",
    "UNet",
    "Widths",
    "evaluate",
    "macs_of",
    "mean_iou",
    "psnr",
    "raw_pairs",
    "scaled_widths",
    "scenes",
]

Widths = tuple[int, int, int]
"""Channels of the three levels, the finest first."""

KINDS = 3
"""Ellipses, rectangles, triangles."""


class UNet(nn.Module):
    """Labels every pixel: three levels, halved by strides, doubled by transposed convolutions, joined by concatenation.

    Takes [N, 3, H, W] with sides that 8 divides, returns logits [N, 4, H, W]; the first convolution halves the image.
    """

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        a, b, c = widths
        self.fine = nn.Sequential(_convolution(3, a, 2), _convolution(a, a))
        self.middle = nn.Sequential(_convolution(a, b, 2), _convolution(b, b))
        self.coarse = nn.Sequential(_convolution(b, c, 2), _convolution(c, c))
        self.up_middle, self.join_middle = nn.ConvTranspose2d(c, b, 2, 2), _convolution(2 * b, b)
        self.up_fine, self.join_fine = nn.ConvTranspose2d(b, a, 2, 2), _convolution(2 * a, a)
        self.head = nn.ConvTranspose2d(a, KINDS + 1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        fine = self.fine(x)
        middle = self.middle(fine)
        x = self.coarse(middle)
        x = self.join_middle(torch.cat([self.up_middle(x), middle], 1))
        return self.head(self.join_fine(torch.cat([self.up_fine(x), fine], 1)))


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Denoiser(nn.Module):
    """Removes noise from raw images as PMRID does (Wang et al. 2020), in small: separable convolutions, added skips.

    Takes and returns [N, 4, H, W], the colour planes of a Bayer pattern, with sides that 4 divides. It has no batch
    norm. What is predicted is the image, not its noise, which takes longer to learn.
    """

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        a, b, c = widths
        self.stem = nn.Conv2d(4, a, 3, padding=1)
        self.fine, self.middle, self.coarse = _Unit(a, a), _Unit(a, b, 2), _Unit(b, c, 2)
        self.up_middle, self.skip_middle = nn.ConvTranspose2d(c, b, 2, 2), _separable(b, b)
        self.up_fine, self.skip_fine = nn.ConvTranspose2d(b, a, 2, 2), _separable(a, a)
        self.join = _Unit(a, a)
        self.head = nn.Conv2d(a, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the image without its noise."""
        fine = self.fine(torch.relu(self.stem(x)))
        middle = self.middle(fine)
        y = self.up_middle(self.coarse(middle)) + self.skip_middle(middle)
        y = self.up_fine(torch.relu(y)) + self.skip_fine(fine)
        return self.head(self.join(torch.relu(y)))


class _Unit(nn.Module):
    """Two separable convolutions around a shortcut, which is a third one where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first, self.second = _separable(inputs, outputs, stride), _separable(outputs, outputs)
        self.shortcut = _separable(inputs, outputs, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.second(torch.relu(self.first(x))))


def _separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs), nn.Conv2d(inputs, outputs, 1))


def scenes(count: int, generator: torch.Generator, side: int = 64) -> tuple[Tensor, Tensor]:
    """Draw ellipses, rectangles and triangles over textured noise, three an image, the later ones in front.

    Returns images float [N, 3, side, side] and labels int64 [N, side, side]: 0 behind, 1 to 3 the kind of the shape.
    Ellipses are plain, rectangles striped and triangles checked; colours say nothing.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *shape).uniform_(low, high, generator=generator)

    coarse = torch.randn(count, 3, side // 8, side // 8, generator=generator)
    images = 0.5 * functional.interpolate(coarse, scale_factor=8, mode="bilinear")
    labels = torch.zeros(count, side, side, dtype=torch.int64)
    for _ in range(3):
        kind = torch.randint(KINDS, (count, 1, 1), generator=generator)
        inside, along, across = _shape(uniform, kind, side)
        rate = uniform(8, 16, 1, 1)
        stripes = (rate * along).sin()
        texture = torch.where(kind == 0, 0.0, torch.where(kind == 1, stripes, stripes * (rate * across).sin()))
        images = torch.where(inside.unsqueeze(1), uniform(-1, 1, 3, 1, 1) + 0.5 * texture.unsqueeze(1), images)
        labels = torch.where(inside, kind + 1, labels)
    return images + 0.3 * torch.randn(images.shape, generator=generator), labels


def _shape(uniform: Callable[..., Tensor], kind: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a shape for every image; return which pixels are inside and its two coordinates, all [N, side, side]."""
    grid = torch.linspace(-1, 1, side)
    angle, size, aspect = uniform(0, 2 * math.pi, 1, 1), uniform(0.25, 0.6, 1, 1), uniform(0.6, 1, 1, 1)
    x, y = grid.view(1, 1, side) - uniform(-0.7, 0.7, 1, 1), grid.view(1, side, 1) - uniform(-0.7, 0.7, 1, 1)
    u = (x * angle.cos() + y * angle.sin()) / size
    v = (y * angle.cos() - x * angle.sin()) / (size * aspect)
    ellipse = u.square() + v.square() < 1
    rectangle = torch.maximum(u.abs(), v.abs()) < 0.85
    triangle = (v > -0.6) & (1.6 * u.abs() + v < 1)
    return torch.where(kind == 0, ellipse, torch.where(kind == 1, rectangle, triangle)), u, v


def raw_pairs(count: int, generator: torch.Generator, side: int = 32) -> tuple[Tensor, Tensor]:
    """Draw piecewise smooth raw images with shot noise and Gaussian noise, how much of it differs from one to the next.

    Returns noisy and clean images, float [N, 4, side, side], the planes of a Bayer pattern; clean ones are in [0, 1].
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *shape).uniform_(low, high, generator=generator)

    clean = uniform(0, 1, 4, 1, 1).expand(count, 4, side, side)
    for _ in range(8):
        inside, along, _ = _shape(uniform, torch.randint(KINDS, (count, 1, 1), generator=generator), side)
        shaded = uniform(0, 1, 4, 1, 1) + uniform(-0.3, 0.3, 4, 1, 1) * along.unsqueeze(1)
        clean = torch.where(inside.unsqueeze(1), shaded, clean).clamp(0, 1)
    gain = uniform(0.005, 0.05, 1, 1, 1)
    shot = torch.poisson(clean / gain, generator=generator) * gain
    return shot + uniform(0.02, 0.1, 1, 1, 1) * torch.randn(clean.shape, generator=generator), clean


def absolute_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean absolute error of a batch of noisy and clean images."""
    noisy, clean = batch
    return functional.l1_loss(module(noisy), clean)


def mean_iou(logits: Tensor, labels: Tensor) -> float:
    """Return the intersection over union in percent, taken over all images, averaged over the classes."""
    found = logits.argmax(1)
    classes = range(logits.shape[1])
    both = torch.stack([((found == k) & (labels == k)).sum() for k in classes])
    either = torch.stack([((found == k) | (labels == k)).sum() for k in classes])
    return 100 * float((both / either.clamp(min=1)).mean())


def psnr(restored: Tensor, clean: Tensor) -> float:
    """Return the peak signal-to-noise ratio in decibels, averaged over images whose peak is 1."""
    return float(-10 * (restored - clean).square().flatten(1).mean(1).log10().mean())


@dataclass(frozen=True)
class Task:
    """A network with what it learns.

    Attributes:
        title: names it.
        build: widths → the network.
        widths: of the whole one.
        shape: of an input.
        draw: (count, generator) → inputs and targets.
        loss: as in `fxprune.training.train`.
        metric: (outputs, targets) → the number that `unit` names.
        unit: name of the metric.
    """

    title: str
    build: Callable[[Widths], nn.Module]
    widths: Widths
    shape: tuple[int, int, int]
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    loss: Loss
    metric: Callable[[Tensor, Tensor], float]
    unit: str


TASKS = {
    "segmentation": Task(
        "Segmentation, U-Net", UNet, (16, 32, 64), (3, 64, 64), scenes, cross_entropy, mean_iou, "mean IoU, %"
    ),
    "denoising": Task(
        "Raw denoising, as PMRID", Denoiser, (16, 32, 64), (4, 32, 32), raw_pairs, absolute_error, psnr, "PSNR, dB"
    ),
}


@functools.cache
def scaled_widths(name: str, share: float) -> Widths:
    """Return the widths, all scaled by one number and rounded up or down, that come closest to a share of the MACs."""
    whole = TASKS[name].widths
    goal, low, high = share * macs_of(name, whole), 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if macs_of(name, rounded(whole, middle)) < goal else (low, middle)
    scales = torch.linspace(0.95 * low, 1.05 * low, 9).tolist()
    sides = ([(max(1, math.floor(scale * width)), math.ceil(scale * width)) for width in whole] for scale in scales)
    found = {(a, b, c) for side in sides for a, b, c in itertools.product(*side)}
    return min(sorted(found), key=lambda widths: abs(macs_of(name, widths) - goal))


def rounded(widths: Widths, scale: float) -> Widths:
    """Return widths scaled by a number, none below 1."""
    a, b, c = (max(1, round(scale * width)) for width in widths)
    return a, b, c


@functools.cache
def macs_of(name: str, widths: Widths) -> float:
    """Count the multiply-accumulates of an input in a network of some widths."""
    with torch.device("meta"):
        return count_macs(TASKS[name].build(widths), Inputs((torch.empty(1, *TASKS[name].shape),)))


@torch.no_grad()
def evaluate(task: Task, module: nn.Module, held: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return the loss and the metric on held-out data; the module ends in the mode that it was in."""
    was_training = module.training
    module.eval()
    found = task.loss(module, held).item(), task.metric(module(held[0]), held[1])
    module.train(was_training)
    return found
