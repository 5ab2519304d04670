"""Top-1 accuracy right after pruning, before any fine-tuning, on real weights and images.

CIFAR ResNet-56 and ImageNet MobileNetV2 lose 10, 30 and 50 % of their multiply-accumulates by every criterion and
scope, with the batch-norm statistics of the dense model and with re-estimated ones. DIR holds `real_data.py`, which
gives the models and images, and the files that it reads.

    python -m benchmarks.one_shot --data DIR
    python -m benchmarks.one_shot --data DIR --models resnet56 --criteria l2,taylor --limit 500

Images that a criterion or a re-estimation sees are never those that accuracy is measured on: for CIFAR they come from
the training set, for ImageNet they are every other image of the sample.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import fxprune
from benchmarks.cases import Case, batches, cifar_case, imagenet_case, load_source, top1
from benchmarks.machine import describe_run, publish
from fxprune.training import cross_entropy

CRITERIA = ("l1", "l2", "fpgm", "bn-scale", "taylor", "random")
SCOPES = ("global", "uniform")
REMOVED = (10, 30, 50)


CASES: dict[str, Callable[[ModuleType, int, int], Case]] = {
    "resnet56": lambda source, limit, seen: cifar_case(source, 56, limit, seen),
    "mobilenet_v2": imagenet_case,
}


def prune(case: Case, criterion: str, scope: str, removed: int) -> fxprune.Result:
    """Remove `removed` percent of a model's MACs."""
    data: dict[str, Any] = {"batches": list(batches(case)), "loss": cross_entropy} if criterion == "taylor" else {}
    return fxprune.prune(case.model, case.example, macs=f"{100 - removed}%", criterion=criterion, scope=scope, **data)


def measure(case: Case, criterion: str, scope: str, removed: int) -> tuple[float, float]:
    """Return top-1 with the dense model's batch-norm statistics, and with re-estimated ones."""
    module = prune(case, criterion, scope, removed).module.eval()
    before = top1(case, module)
    fxprune.recalibrate_batchnorm(module, (x for x, _ in batches(case)))
    return before, top1(case, module)


def accuracy_table(case: Case, arguments: argparse.Namespace) -> str:
    """Measure all criteria and scopes on a case; return Markdown."""
    criteria, scopes, removed = arguments.criteria, arguments.scopes, arguments.removed
    rows = []
    bar = tqdm(total=len(scopes) * len(criteria) * len(removed), desc=case.title, file=sys.stderr)
    for scope in scopes:
        for criterion in criteria:
            pairs = []
            for share in removed:
                pairs.append(measure(case, criterion, scope, share))
                bar.update()
            rows.append([scope, criterion, *(f"{pair[k]:.1f}" for k in (0, 1) for pair in pairs)])
    bar.close()
    headers = ["scope", "criterion", *(f"−{s} %" for s in removed), *(f"−{s} %, BN" for s in removed)]
    align = ("left", "left", *["right"] * (2 * len(removed)))
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)
    return f"### {case.title}\n\nDense: {top1(case, case.model):.1f} %. {case.note}.\n\n{table}"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    def names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
        def read(text: str) -> tuple[str, ...]:
            chosen = tuple(text.split(","))
            for name in chosen:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"unknown '{name}'; known: {', '.join(known)}")
            return chosen

        return read

    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of real_data.py and its files")
    parser.add_argument("--models", type=names(tuple(CASES)), default=",".join(CASES))
    parser.add_argument("--criteria", type=names(CRITERIA), default=",".join(CRITERIA))
    parser.add_argument("--scopes", type=names(SCOPES), default=",".join(SCOPES))
    parser.add_argument(
        "--removed",
        type=lambda text: tuple(int(share) for share in text.split(",")),
        default=",".join(map(str, REMOVED)),
        help="percentages of MACs to remove",
    )
    parser.add_argument("--limit", type=int, help="images tested; by default 2,000 of CIFAR and 500 of ImageNet")
    parser.add_argument("--seen", type=int, help="images for criteria and statistics; by default 500")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and on request write."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    source = load_source(arguments.data)
    start = time.perf_counter()
    parts = [describe_run(("torch", "torchvision", "fxprune"))]
    for name in arguments.models:
        limit = arguments.limit or {"resnet56": 2000, "mobilenet_v2": 500}[name]
        parts.append(accuracy_table(CASES[name](source, limit, arguments.seen or 500), arguments))
        print(f"{name}: done after {time.perf_counter() - start:.0f} s", file=sys.stderr)
    publish(parts, arguments.markdown)


if __name__ == "__main__":
    main()
