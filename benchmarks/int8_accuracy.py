"""Accuracy on integers with trained weights: float, dense int8, and int8 with 1×4 blocks of zeros.

Sparse rows are one-shot, uniform, without any training; the float row of the same sparsity says what the zeros cost,
and the int8 row beside it what quantisation adds. Agreement is the share of images for which float and int8 of the same
weights predict the same class. Larger kernels are computed on integers too, by im2col.

    python -m benchmarks.int8_accuracy --data DIR
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

import fxprune
from benchmarks.cases import BATCH, Case, batches, cifar_case, imagenet_case, load_source
from benchmarks.machine import describe_run, publish

SPARSITIES = (0.0, 0.4, 0.5, 0.6)


@torch.inference_mode()
def predictions(case: Case, module: nn.Module) -> np.ndarray:
    """Return the predicted class of every test image."""
    images = case.tested[0]
    found = [module(case.normalize(images[i : i + BATCH])).argmax(1).numpy() for i in range(0, len(images), BATCH)]
    return np.concatenate(found)


def rows(case: Case, sparsities: list[float], observer: str, calibrated: int) -> Iterator[list[str]]:
    """Yield a row for every sparsity: top-1 of float and int8, the loss between, and how often they agree."""
    given = [image for image, _ in batches(case)][: max(calibrated // BATCH, 1)]
    labels = case.tested[1]
    for sparsity in sparsities:
        model: nn.Module = copy.deepcopy(case.model)
        if sparsity:
            sparse = fxprune.sparsify(model, case.example, sparsity=sparsity, layers="all").module
            model = fxprune.finalize(sparse)
            fxprune.recalibrate_batchnorm(model, given)
        lowered = fxprune.lower(
            model, case.example, calibration=given, observer=observer, backend="native", im2col="*"
        ).module
        floats, levels = predictions(case, model), predictions(case, lowered)
        before, after = (100 * float((found == labels).mean()) for found in (floats, levels))
        agreed = float((floats == levels).mean())
        yield [
            case.title,
            f"{sparsity:.0%}",
            f"{before:.2f}",
            f"{after:.2f}",
            f"{after - before:+.2f}",
            f"{agreed:.1%}",
        ]


def main() -> None:
    """Measure, print, and on request write."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of weights and images")
    parser.add_argument("--sparsities", default=",".join(map(str, SPARSITIES)))
    parser.add_argument("--limit", type=int, default=2000, help="test images of CIFAR-10; 500 of ImageNet at most")
    parser.add_argument("--calibration", type=int, default=250, help="images that ranges are found in")
    parser.add_argument("--observer", default="histogram")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to FILE")
    arguments = parser.parse_args()
    source, seen = load_source(arguments.data), max(arguments.calibration, 500)
    cases = [cifar_case(source, 56, arguments.limit, seen), imagenet_case(source, min(arguments.limit, 500), 250)]
    sparsities = [float(s) for s in arguments.sparsities.split(",")]
    found = [row for case in cases for row in rows(case, sparsities, arguments.observer, arguments.calibration)]
    header = ["model", "sparsity", "float, %", "int8, %", "difference", "agreement"]
    table = tabulate(found, header, "github", disable_numparse=True, colalign=("left", *["right"] * 5))
    notes = "\n".join(f"* {case.title}: {case.note}" for case in cases)
    publish([describe_run(("torch", "torchao", "fxprune")), table, notes], arguments.markdown)


if __name__ == "__main__":
    main()
