"""Fig. 1 of paper 003: what the gradient of Eq. 3 does to learned thresholds, beside that of Eq. 14.

CIFAR ResNet-20 learns a threshold for every layer twice, from the same weights and on the same batches: once with the
sigmoid taken as constant for the weights (Eq. 14), once with its derivative (Eq. 3), which pushes weights away from the
threshold until it meets none and stalls. DIR holds `real_data.py`, which gives the model and images.

    python -m benchmarks.threshold_stall --data DIR --plots FOLDER
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxprune
from benchmarks.cases import Case, cifar_case, load_source, training_data
from benchmarks.machine import describe_run, publish
from fxprune.plots import plot_pruned_weights
from fxprune.runtime.thresholds import LearnedThreshold
from fxprune.runtime.weight_masks import parametrized
from fxprune.training import Training, classification, cross_entropy, train
from fxprune.training.learned_thresholds import LearnedThresholds, attach_thresholds, layer_sparsities

GRADIENTS = {"Eq. 14": False, "Eq. 3": True}


def learn(case: Case, data: Any, held: Any, exact: bool, arguments: argparse.Namespace) -> nn.Module:
    """Learn thresholds of all convolutions; return the model as training left it."""
    model = copy.deepcopy(fxprune.trace(case.model, case.example))
    attach_thresholds(model, [(n, "weight") for n, m in model.named_modules() if isinstance(m, nn.Conv2d)], exact=exact)
    options = Training(
        -(-arguments.steps // len(data)),
        arguments.learning_rate,
        nesterov=True,
        schedule="constant",
        steps_per_epoch=min(arguments.steps, len(data)),
        tolerance=None,
        keep_best=False,
        seed=arguments.seed,
        mixed_precision=arguments.mixed_precision,
    )
    with tempfile.TemporaryDirectory() as folder:
        hook = LearnedThresholds(folder, arguments.regularization, arguments.threshold_rate, growth=1.0)
        train(model, data, cross_entropy, options, validation=held, measure=classification, hooks=[hook])
    return model


def thresholds_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return the trained weights, the threshold and the temperature of every layer."""
    found = {}
    for path, owner, _, part in parametrized(model, LearnedThreshold):
        assert isinstance(part, LearnedThreshold)
        held: Any = owner.parametrizations
        found[path] = held["weight"].original.detach(), part.threshold.detach(), part.temperature
    return found


def zeros_of(weights: Tensor, threshold: Tensor) -> Tensor:
    """Return which weights hard pruning zeroes."""
    return weights.square() <= threshold


def row_of(layer: str, models: dict[str, nn.Module]) -> tuple[str, ...]:
    """Say for each gradient how sparse a layer got, and which share of its weights lies near the threshold."""
    cells = []
    for model in models.values():
        weights, threshold, temperature = thresholds_of(model)[layer]
        near = ((weights.square() - threshold).abs() < 20 * temperature).float().mean()
        cells.append((f"{threshold:.2e}", f"{zeros_of(weights, threshold).float().mean():.1%}", f"{near:.2%}"))
    return layer, *(cell for both in zip(*cells, strict=True) for cell in both)


def sparsity_of(model: nn.Module) -> float:
    """Return the share of all weights that hard pruning zeroes."""
    counts = layer_sparsities(model).values()
    return sum(zeros for zeros, _ in counts) / sum(total for _, total in counts)


def draw(case: Case, models: dict[str, nn.Module], layer: str, folder: Path) -> None:
    """Draw squared weights after against before for both gradients, as the paper's figure."""
    folder.mkdir(parents=True, exist_ok=True)
    before = case.model.get_parameter(f"{layer}.weight").detach()
    for name, model in models.items():
        weights, threshold, _ = thresholds_of(model)[layer]
        file = folder / f"stall-{name.replace('. ', '')}.png"
        plot_pruned_weights(before, weights, file, threshold=float(threshold))


def main() -> None:
    """Measure, print, and on request draw and write."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of real_data.py and its files")
    parser.add_argument("--steps", type=int, default=312, help="optimizer steps of 128 images")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--regularization", type=float, default=1e-5)
    parser.add_argument("--threshold-rate", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("--mixed-precision", default="no", help="of training: no or bf16")
    parser.add_argument("--layer", default="layer2.0.conv2", help="which one to draw")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the figure for both gradients there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = load_source(arguments.data)
    data, held = training_data(source)
    case = cifar_case(source, 20, 1000, 500)
    models = {name: learn(case, data, held, exact, arguments) for name, exact in GRADIENTS.items()}
    layers = list(thresholds_of(models["Eq. 14"]))
    columns = [f"{what}, {name}" for what in ("τ", "sparsity", "within 20 T") for name in GRADIENTS]
    rows = [row_of(layer, models) for layer in layers]
    table = tabulate(rows, ["layer", *columns], "github", disable_numparse=True, colalign=("left", *["right"] * 6))
    total = ", ".join(f"{name} {sparsity_of(model):.1%}" for name, model in models.items())
    if arguments.plots:
        draw(case, models, arguments.layer, arguments.plots)
    publish([describe_run(("torch", "fxprune", "accelerate")), table, f"Of all weights: {total}."], arguments.markdown)


if __name__ == "__main__":
    main()
