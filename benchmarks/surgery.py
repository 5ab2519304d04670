"""Time of structured pruning: fxprune beside Torch-Pruning, on torchvision models.

Both sides do one whole job on a fresh copy of the same model: find what is coupled, rank channels by their l2 norm,
remove about half of the multiply-accumulates. For fxprune that is `fxprune.prune(model, x, macs="50%",
criterion="l2")`: trace, orbits, selection and surgery. For Torch-Pruning it is `BasePruner(...)` and `step()`
with the options of its README. Building and copying models, counting MACs and running the results are not timed. The
two alternate, so that a drift of the machine's speed meets both.

    python -m benchmarks.surgery
    python -m benchmarks.surgery --models resnet50,densenet121 --repeats 3 --stages
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fxprune
from benchmarks.jobs import Job, count_macs, prune_by_fxprune, prune_by_peer
from benchmarks.machine import describe_run, publish
from fxprune import Inputs
from fxprune.graph.passes import PassEvent

MODELS = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "googlenet",
    "inception_v3",
    "squeezenet1_1",
    "regnet_y_400mf",
    "vgg16_bn",
    "alexnet",
    "fcn_resnet50",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)
OPTIONS = {"inception_v3": {"init_weights": False}, "googlenet": {"init_weights": False}}
SIZES = {"inception_v3": 299}
PASSES = ("mask-insertion", "channel-selection", "channel-surgery")


@dataclass
class Side:
    """What one tool did with one model."""

    seconds: list[float] = field(default_factory=list)
    macs_left: float | None = None
    failure: str = ""

    @property
    def median(self) -> float | None:
        """Median seconds, None when it failed."""
        return None if self.failure or not self.seconds else statistics.median(self.seconds)

    def outcome(self) -> str:
        """MACs left, or how it failed."""
        return self.failure or f"{self.macs_left:.1%}"


def build(name: str) -> tuple[nn.Module, Inputs]:
    """Return a torchvision model with random weights in eval mode, and one image for it."""
    torch.manual_seed(0)
    options: dict[str, Any] = dict(OPTIONS.get(name, {}))
    if name in torchvision.models.list_models(module=torchvision.models.segmentation):
        options["weights_backbone"] = None
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    size = SIZES.get(name, 224)
    return model, Inputs((torch.randn(1, 3, size, size),))


def run_once(job: Job, model: nn.Module, inputs: Inputs, side: Side, whole: float) -> None:
    """Time `job` on a fresh copy of `model`; the first time, also run the result."""
    fresh = copy.deepcopy(model)
    gc.collect()
    start = time.perf_counter()
    try:
        pruned = job(fresh, inputs)
    except Exception as error:
        side.failure = f"fails: {type(error).__name__}"
        return
    side.seconds.append(time.perf_counter() - start)
    if side.macs_left is not None:
        return
    try:
        side.macs_left = count_macs(pruned, inputs) / whole
    except Exception as error:
        side.failure = f"result does not run: {type(error).__name__}"


def compare(name: str, jobs: Sequence[Job], repeats: int) -> list[Side]:
    """Run all jobs on a model, in turn, `repeats` times after one warm-up."""
    model, inputs = build(name)
    whole = count_macs(model, inputs)
    sides = [Side() for _ in jobs]
    for _ in range(repeats + 1):
        for job, side in zip(jobs, sides, strict=True):
            if not side.failure:
                run_once(job, model, inputs, side, whole)
    for side in sides:
        side.seconds = side.seconds[1:]
    return sides


def measure_stages(name: str, repeats: int) -> dict[str, float]:
    """Return median seconds of fxprune's stages on a model; "the rest" is what the others leave."""
    model, inputs = build(name)
    found: dict[str, list[float]] = {stage: [] for stage in ("trace", *PASSES, "total")}
    for _ in range(repeats):
        start = time.perf_counter()
        fxprune.trace(model, inputs)
        found["trace"].append(time.perf_counter() - start)
        start = time.perf_counter()
        prune_by_fxprune(model, inputs)
        found["total"].append(time.perf_counter() - start)

        def note(event: PassEvent) -> None:
            found[event.name.partition("{")[0]].append(event.seconds)

        fxprune.prune(model, inputs, macs="50%", criterion="l2", observers=[note])
    medians = {stage: statistics.median(seconds) for stage, seconds in found.items()}
    total = medians.pop("total")
    return {**medians, "the rest": total - sum(medians.values()), "total": total}


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive numbers.

    >>> geometric_mean([0.5, 2.0])
    1.0
    """
    return math.exp(statistics.fmean(math.log(v) for v in values))


def comparison_table(results: dict[str, list[Side]], ratio: float) -> str:
    """Return the comparison as Markdown, with the geometric mean over the models where both sides worked."""
    rows, ratios = [], []
    for name, (ours, theirs) in results.items():
        own, peer = ours.median, theirs.median
        quotient = None if own is None or peer is None else own / peer
        if quotient is not None:
            ratios.append(quotient)
        rows.append(
            [
                name,
                *("–" if side.median is None else f"{side.median:.3f}" for side in (ours, theirs)),
                "–" if quotient is None else f"{quotient:.2f}",
                ours.outcome(),
                theirs.outcome(),
            ]
        )
    headers = ["model", "fxprune, s", "Torch-Pruning, s", "ratio", "MACs left", "MACs left (TP)"]
    text = tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 5))
    if not ratios:
        return text
    mean = geometric_mean(ratios)
    note = f"Geometric mean of the ratios over {len(ratios)} models: **{mean:.2f}**."
    return f"{text}\n\n{note} Torch-Pruning's `pruning_ratio` is {ratio}; a result counts when it runs."


def stages_table(stages: dict[str, dict[str, float]]) -> str:
    """Return fxprune's stages as Markdown, in milliseconds."""
    columns = list(next(iter(stages.values())))
    rows = [[name, *(f"{1000 * found[c]:.0f}" for c in columns)] for name, found in stages.items()]
    align = ("left", *["right"] * len(columns))
    return tabulate(
        rows, ["model", *(f"{c}, ms" for c in columns)], tablefmt="github", disable_numparse=True, colalign=align
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="torchvision names, separated by commas")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each tool on each model")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("--peer-ratio", type=float, default=0.3, help="Torch-Pruning's pruning_ratio of every layer")
    parser.add_argument("--stages", action="store_true", help="also break fxprune's time down by stage")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    arguments = parser.parse_args()
    known = torchvision.models.list_models()
    for name in arguments.models.split(","):
        if name not in known:
            parser.error(f"torchvision has no model '{name}'; known: {', '.join(MODELS)}, …")
    if arguments.repeats < 1 or arguments.threads < 1:
        parser.error("--repeats and --threads are at least 1")
    return arguments


def main() -> None:
    """Measure, print, and on request write."""
    arguments = parse_arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    names = arguments.models.split(",")
    jobs = [prune_by_fxprune, prune_by_peer(arguments.peer_ratio)]
    bar = tqdm(names, file=sys.stderr)
    results = {name: compare(name, jobs, arguments.repeats) for name in bar}
    parts = [
        describe_run(("torch", "torchvision", "fxprune", "torch-pruning"))
        + f"\n* median of {arguments.repeats} alternating runs after a warm-up; batch 1; random weights",
        comparison_table(results, arguments.peer_ratio),
    ]
    if arguments.stages:
        stages = {name: measure_stages(name, arguments.repeats) for name in names if not results[name][0].failure}
        parts.append(stages_table(stages))
    publish(parts, arguments.markdown)


if __name__ == "__main__":
    main()
