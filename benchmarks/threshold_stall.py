"""Fig. 1 of paper 003: what the gradient of Eq. 3 does to learned thresholds, beside that of Eq. 14.

CIFAR ResNet-20 learns a threshold for every layer twice, from the same weights and on the same batches: once with the
sigmoid taken as constant for the weights (Eq. 14), once with its derivative (Eq. 3), which pushes weights away from the
threshold until it meets none and stalls. DIR holds `real_data.py`, which gives the model and images.

    python -m benchmarks.threshold_stall --data DIR --plots FOLDER
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxprune
from benchmarks.cases import Case, cifar_case, load_source
from benchmarks.machine import describe_run, publish
from benchmarks.weight_sparsity import training_data
from fxprune.plots import plot_pruned_weights
from fxprune.runtime.thresholds import LearnedThreshold
from fxprune.runtime.weight_masks import parametrized
from fxprune.training import Training, classification, cross_entropy, train
from fxprune.training.learned_thresholds import LearnedThresholds, attach_thresholds, layer_sparsities

LAYER = "layer3.2.conv2"
"""The layer of the paper's figure."""

GRADIENTS = {"Eq. 14": False, "Eq. 3": True}


def learn(case: Case, data: Any, held: Any, exact: bool, arguments: argparse.Namespace) -> nn.Module:
    """Learn thresholds of all convolutions; return the model as training left it."""
    model = fxprune.trace(case.model, case.example)
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


def layer_of(model: nn.Module) -> tuple[Tensor, LearnedThreshold]:
    """Return the weights that are trained in the figure's layer, and their threshold."""
    for path, owner, _, part in parametrized(model, LearnedThreshold):
        if path == LAYER:
            held: Any = owner.parametrizations
            assert isinstance(part, LearnedThreshold)
            return held["weight"].original.detach(), part
    raise SystemExit(f"the model has no layer {LAYER}")


def row_of(name: str, model: nn.Module) -> tuple[str, ...]:
    """Say how far thresholds came, and how many weights are left near the one of the figure's layer."""
    weights, part = layer_of(model)
    threshold = float(part.threshold.detach())
    counts = layer_sparsities(model).values()
    sparsity = sum(zeros for zeros, _ in counts) / sum(total for _, total in counts)
    near = ((weights.square() - threshold).abs() < threshold / 2).float().mean()
    zeros, total = layer_sparsities(model)[f"{LAYER}.weight"]
    return name, f"{sparsity:.1%}", f"{threshold:.2e}", f"{zeros / total:.1%}", f"{near:.2%}"


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
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the figure for both gradients there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = load_source(arguments.data)
    data, held = training_data(source)
    rows = []
    for name, exact in GRADIENTS.items():
        case = cifar_case(source, 20, 1000, 500)
        before = case.model.get_parameter(f"{LAYER}.weight").detach().clone()
        model = learn(case, data, held, exact, arguments)
        rows.append(row_of(name, model))
        if arguments.plots:
            arguments.plots.mkdir(parents=True, exist_ok=True)
            weights, part = layer_of(model)
            file = arguments.plots / f"stall-{name.replace('. ', '')}.png"
            plot_pruned_weights(before, weights, file, threshold=float(part.threshold.detach()))
    header = ["gradient", "sparsity", f"τ of {LAYER}", "its sparsity", "its weights with w² within τ ± τ/2"]
    table = tabulate(rows, header, "github", disable_numparse=True, colalign=("left", *["right"] * 4))
    publish([describe_run(("torch", "fxprune", "accelerate")), table], arguments.markdown)


if __name__ == "__main__":
    main()
