"""Top-1 accuracy of sparse networks, by method and sparsity, before and after short fine-tuning with fixed masks.

CIFAR ResNet-20 and -56 and ImageNet MobileNetV2 lose 50, 70, 80 and 90 % of their weights: the same share of every
layer (uniform), the least of all layers (global), 1×4 blocks of every layer (1x4), or by thresholds that are learned
(ltp, Azarian et al. 2020). DIR holds `real_data.py`, which gives the models and images, and the files that it reads.

    python -m benchmarks.weight_sparsity --data DIR --json rows.json --work FOLDER
    python -m benchmarks.weight_sparsity --data DIR --models resnet20 --methods uniform,ltp --levels 80 --epochs 1

Rows are written as they are measured; started again with the same `--json` and `--work`, a run goes on where it ended.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tabulate import tabulate

import fxprune
from benchmarks.cases import Case, batches, cifar_case, imagenet_case, load_source, top1, training_data
from benchmarks.machine import describe_run, publish
from fxprune.training import Training, classification, cross_entropy, train

LEVELS = (50, 70, 80, 90)
METHODS: dict[str, dict[str, str]] = {
    "uniform": {"scope": "uniform", "block": "1x1"},
    "global": {"scope": "global", "block": "1x1"},
    "1x4": {"scope": "uniform", "block": "1x4"},
    "ltp": {},
}
LAYERS = {"resnet20": ("all",), "resnet56": ("all",), "mobilenet_v2": ("conv1x1",)}
CASES: dict[str, Callable[[ModuleType, int], Case]] = {
    "resnet20": lambda source, limit: cifar_case(source, 20, limit, 500),
    "resnet56": lambda source, limit: cifar_case(source, 56, limit, 500),
    "mobilenet_v2": lambda source, limit: imagenet_case(source, min(limit, 500), 500),
}


@dataclass(frozen=True)
class Row:
    """One network: accuracies in percent; None where there was nothing to train on."""

    model: str
    method: str
    level: int
    sparsity: float
    macs: float
    before: float
    recalibrated: float
    tuned: float | None
    epochs: int
    seconds: float


@dataclass(frozen=True)
class Setting:
    """What every row of a run shares."""

    source: ModuleType
    levels: tuple[int, ...]
    epochs: int
    learning_rate: float
    ltp: dict[str, Any]
    ltp_epochs: int
    limit: int
    seed: int
    mixed_precision: str
    work: Path


def options(setting: Setting, epochs: int, **more: Any) -> Training:
    """Return how the CIFAR networks are trained."""
    usual = Training(
        epochs,
        setting.learning_rate,
        nesterov=True,
        seed=setting.seed,
        mixed_precision=setting.mixed_precision,
        tolerance=None,
    )
    return replace(usual, **more)


def networks(name: str, case: Case, method: str, setting: Setting) -> Iterator[tuple[int, fxprune.Result]]:
    """Yield (level, sparse network) for every level, the sparsest last."""
    if method != "ltp":
        for level in setting.levels:
            share = level / 100
            yield (
                level,
                fxprune.sparsify(case.model, case.example, sparsity=share, layers=LAYERS[name], **METHODS[method]),
            )
        return
    seen, held = training_data(setting.source)
    trace = fxprune.learn_thresholds(
        case.model,
        case.example,
        seen,
        cross_entropy,
        options(setting, setting.ltp_epochs, schedule="constant", learning_rate=setting.ltp["learning_rate"]),
        folder=setting.work / name,
        validation=held,
        measure=classification,
        layers=LAYERS[name],
        target=min(max(setting.levels) / 100 + 0.01, 0.99),
        growth=0.05,
        interval=10,
        **{key: value for key, value in setting.ltp.items() if key != "learning_rate"},
    )
    for level in setting.levels:
        if max(one.sparsity for one in trace.checkpoints) < level / 100:
            print(f"{name}: the trace ends before {level} %; no row", file=sys.stderr)
            continue
        yield level, fxprune.apply_checkpoint(case.model, case.example, trace.at(sparsity=level / 100))


def measure(name: str, case: Case, method: str, level: int, result: fxprune.Result, setting: Setting) -> Row:
    """Measure one network before and after fine-tuning."""
    start = time.perf_counter()
    module = result.module.eval()
    before = top1(case, module)
    again = fxprune.recalibrate_batchnorm(copy.deepcopy(module), (x for x, _ in batches(case)))
    recalibrated, tuned, epochs = top1(case, again), None, 0
    if setting.epochs and name != "mobilenet_v2":
        seen, held = training_data(setting.source)
        history = train(
            module, seen, cross_entropy, options(setting, setting.epochs), validation=held, measure=classification
        )
        tuned, epochs = top1(case, module.eval()), len(history.records)
    masked = result.plan.weights
    total = sum(torch.Size(row.shape).numel() for row in masked)
    zeros = sum(int((~row.mask()).sum()) for row in masked)
    macs = result.report.macs[1] / result.report.macs[0]
    seconds = time.perf_counter() - start
    return Row(name, method, level, zeros / total, macs, before, recalibrated, tuned, epochs, seconds)


def table(rows: list[Row]) -> str:
    """Return the rows of one model as Markdown."""
    cells = [
        (
            row.method,
            f"{row.level} %",
            f"{row.sparsity:.1%}",
            f"{row.macs:.1%}",
            f"{row.before:.2f}",
            f"{row.recalibrated:.2f}",
            "–" if row.tuned is None else f"{row.tuned:.2f}",
        )
        for row in sorted(rows, key=lambda row: (row.level, list(METHODS).index(row.method)))
    ]
    header = ["method", "level", "sparsity", "MACs left", "top-1", "BN re-estimated", "fine-tuned"]
    return tabulate(cells, header, "github", disable_numparse=True, colalign=("left", *["right"] * 6))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    def names(known: Any) -> Callable[[str], tuple[str, ...]]:
        def read(text: str) -> tuple[str, ...]:
            unknown = [name for name in text.split(",") if name not in known]
            if unknown:
                raise argparse.ArgumentTypeError(f"unknown '{unknown[0]}'; known: {', '.join(known)}")
            return tuple(text.split(","))

        return read

    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of real_data.py and its files")
    parser.add_argument("--models", type=names(CASES), default=",".join(CASES))
    parser.add_argument("--methods", type=names(METHODS), default=",".join(METHODS))
    parser.add_argument("--levels", type=lambda text: tuple(map(int, text.split(","))), default=LEVELS)
    parser.add_argument("--epochs", type=int, default=10, help="of fine-tuning, on 20,000 images; 0 for none")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of fine-tuning")
    parser.add_argument("--ltp-epochs", type=int, default=6, help="of learning thresholds, at most")
    parser.add_argument("--ltp-learning-rate", type=float, default=0.02)
    parser.add_argument("--ltp-regularization", type=float, default=6e-4, help="λ at the end")
    parser.add_argument("--ltp-ramp", type=float, default=2.0, help="λ grows as this power of the part of the way")
    parser.add_argument("--ltp-threshold-rate", type=float, default=1e-5)
    parser.add_argument("--limit", type=int, default=10000, help="images tested")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("--mixed-precision", default="no", help="of training: no or bf16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, kept and added to")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where traces are kept; temporary by default")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    return parser.parse_args()


def measure_all(arguments: argparse.Namespace, setting: Setting, rows: list[Row]) -> None:
    """Measure what `rows` lacks, and add it."""
    for name in arguments.models:
        case = CASES[name](setting.source, setting.limit)
        for method in arguments.methods:
            known = {row.level for row in rows if (row.model, row.method) == (name, method)}
            if known.issuperset(setting.levels):
                continue
            if method == "ltp" and name == "mobilenet_v2":
                print("mobilenet_v2: no training images, so no thresholds are learned", file=sys.stderr)
                continue
            for level, result in networks(name, case, method, setting):
                if level in known:
                    continue
                rows.append(measure(name, case, method, level, result, setting))
                print(f"{rows[-1]}", file=sys.stderr)
                if arguments.json:
                    arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def main() -> None:
    """Measure, print, and on request write."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    rows = []
    if arguments.json and arguments.json.exists():
        rows = [Row(**row) for row in json.loads(arguments.json.read_text())]
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(
            load_source(arguments.data),
            arguments.levels,
            arguments.epochs,
            arguments.learning_rate,
            {
                "learning_rate": arguments.ltp_learning_rate,
                "regularization": arguments.ltp_regularization,
                "threshold_rate": arguments.ltp_threshold_rate,
                "ramp": arguments.ltp_ramp,
            },
            arguments.ltp_epochs,
            arguments.limit,
            arguments.seed,
            arguments.mixed_precision,
            arguments.work or Path(scratch),
        )
        measure_all(arguments, setting, rows)
        parts = [describe_run(("torch", "torchvision", "fxprune", "accelerate"))]
        for name in arguments.models:
            case = CASES[name](setting.source, setting.limit)
            head = f"### {case.title}\n\nDense: {top1(case, case.model):.2f} %. {case.note}."
            parts.append(f"{head}\n\n{table([row for row in rows if row.model == name])}")
    publish(parts, arguments.markdown)


if __name__ == "__main__":
    main()
