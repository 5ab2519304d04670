"""Top-1 accuracy of networks whose gates learned which channels leave (paper 001), beside criteria, at the same MACs.

CIFAR ResNet-20 and -56 keep 75, 50 and 25 % of their multiply-accumulates: by gates whose logits are predicted from
feature maps (gates) or are parameters of their own (trained), and by criteria without any learning (l2, fpgm, taylor;
scope global). All are fine-tuned alike for F steps. Gates learn for L steps before that, with the weights beside them,
so criteria are fine-tuned on as many images more, too. The last weights count, no image is held out to
choose others. The part "distillation" has teachers for the ResNet-20 that gates halved, and for the dense one. DIR
holds `real_data.py`, which gives the models and images, and the files that it reads.

    python -m benchmarks.learned_channels --data DIR --json rows.json --work FOLDER
    python -m benchmarks.learned_channels --data DIR --models resnet20 --levels 50 --learn-steps 40 --tune-steps 40
    python -m benchmarks.learned_channels --data DIR --part distillation --json rows.json --work FOLDER

Rows are written as they are measured; started again with the same `--json` and `--work`, a run goes on where it ended.
Rows of other settings stay in the file and out of the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import load_source, top1
from benchmarks.learned_channels_rows import (
    ALONE,
    Job,
    Row,
    add_row,
    distillation_table,
    pruning_tables,
    read_rows,
    spelled,
)
from benchmarks.learned_channels_runs import DEPTHS, LOGITS, Setting, beginning, case_of, estimate, learn, measure
from benchmarks.machine import describe_run, publish
from fxprune.insights import layer_widths
from fxprune.plots import plot_gates, plot_widths

GATES: dict[str, Any] = {
    "optimizer": "adamw",
    "learning_rate": 3e-4,
    "weight_decay": 0.0,
    "schedule": "constant",
    "cost_weight": 10.0,
    "entropy_weight": 0.1,
    "annealing": "target",
    "freeze_batchnorm": True,
}
"""How gates learn, by default, whatever their logits are: options of `Training` and of `learn_channels`."""

LEVELS = (75, 50, 25)
METHODS = (*LOGITS, "l2", "fpgm", "taylor")

PARTS = ("pruning", "distillation")
STUDENTS = (("resnet20", 50, "gates"), ("resnet20", 100, "dense"))
TEACHERS = (ALONE, "resnet20", "resnet56", "resnet20+resnet56")


def jobs_of_pruning(arguments: argparse.Namespace, setting: Setting) -> Iterator[Job]:
    """Yield the networks of the first part, seed by seed: a run that ends early has whole tables of fewer seeds."""
    learn_steps, tune_steps = arguments.learn_steps, arguments.tune_steps
    longer = tune_steps + 2 * round(learn_steps * arguments.learn_batch_size / arguments.batch_size / 2)
    for seed in arguments.seeds:
        for model in arguments.models:
            for level in arguments.levels:
                for method in arguments.methods:
                    settings = setting.all(method, ALONE)
                    if method in LOGITS:
                        yield Job(model, level, method, seed, ALONE, learn_steps, tune_steps, settings)
                        continue
                    for steps in (tune_steps, longer):
                        yield Job(model, level, method, seed, ALONE, 0, steps, settings)


def jobs_of_distillation(arguments: argparse.Namespace, setting: Setting) -> Iterator[Job]:
    """Yield the networks of the second part; those without a teacher may be in the first part too."""
    for seed in arguments.seeds:
        for model, level, method in STUDENTS:
            learn_steps = arguments.learn_steps if method in LOGITS else 0
            for teachers in TEACHERS:
                settings = setting.all(method, teachers)
                yield Job(model, level, method, seed, teachers, learn_steps, arguments.tune_steps, settings)


def measure_all(jobs: Sequence[Job], setting: Setting, file: Path | None) -> list[Row]:
    """Measure what the file lacks and add it there; return the rows of all jobs."""
    rows = {row.job: row for row in read_rows(file)}
    missing = [job for job in jobs if job not in rows]
    if missing:
        duration = timedelta(seconds=round(estimate(missing, setting)))
        print(f"{len(missing)} of {len(jobs)} networks to measure, in about {duration} (h:mm:ss)", file=sys.stderr)
    for number, job in enumerate(missing, start=1):
        rows[job] = measure(job, setting)
        print(f"{number}/{len(missing)} {rows[job]}", file=sys.stderr, flush=True)
        if file is not None:
            add_row(file, rows[job])
    return [rows[job] for job in jobs]


def listed(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a reader of names, of which all must be known."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown '{name}'; known: {', '.join(known)}")
        return names

    return read


def numbers(text: str) -> tuple[int, ...]:
    """Read whole numbers."""
    return tuple(map(int, text.split(",")))


def even(text: str) -> int:
    """Read a number of steps."""
    steps = int(text)
    if steps < 2 or steps % 2:
        raise argparse.ArgumentTypeError(f"{steps} steps cannot be shared by two teachers; give an even number above 0")
    return steps


def gate_options(text: str) -> dict[str, Any]:
    """Read name=value,…, the values as in JSON or as plain words."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in (*GATES, "gate_rate"):
            raise argparse.ArgumentTypeError(f"unknown '{name}'; known: {', '.join(GATES)}, gate_rate")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of real_data.py and its files")
    parser.add_argument("--part", type=listed(PARTS), default=PARTS[0], help=f"of {','.join(PARTS)}")
    parser.add_argument("--models", type=listed(DEPTHS), default=",".join(DEPTHS), help="of the first part")
    parser.add_argument("--levels", type=numbers, default=LEVELS, help="percent of the MACs to leave, likewise")
    parser.add_argument("--methods", type=listed(METHODS), default=",".join(METHODS), help="likewise")
    parser.add_argument("--seeds", type=numbers, default=(0, 1))
    parser.add_argument("--learn-steps", type=even, default=300, help="L: optimizer steps that gates learn for")
    parser.add_argument("--tune-steps", type=even, default=600, help="F: optimizer steps of fine-tuning")
    parser.add_argument("--batch-size", type=int, default=128, help="of fine-tuning")
    parser.add_argument("--learn-batch-size", type=int, default=32, help="of the gates' learning")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of fine-tuning: SGD, cosine")
    parser.add_argument("--mixed-precision", default="no", help="of fine-tuning: no or bf16")
    parser.add_argument("--gates", type=gate_options, default={}, metavar="NAME=VALUE,…", help=f"over {spelled(GATES)}")
    parser.add_argument("--weight", type=float, default=5.0, help="of the divergence from a teacher")
    parser.add_argument("--temperature", type=float, default=1.0, help="likewise")
    parser.add_argument("--limit", type=int, default=10000, help="images tested")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, kept and added to")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where runs are kept; temporary by default")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="a folder that is there, for pictures of gates")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    return parser.parse_args()


def setting_of(arguments: argparse.Namespace, work: Path) -> Setting:
    """Return what every row of a run shares."""
    return Setting(
        load_source(arguments.data),
        work,
        arguments.limit,
        arguments.batch_size,
        arguments.learn_batch_size,
        {**GATES, **arguments.gates},
        {"learning_rate": arguments.learning_rate, "nesterov": True, "mixed_precision": arguments.mixed_precision},
        {"weight": arguments.weight, "temperature": arguments.temperature},
    )


def draw(arguments: argparse.Namespace, setting: Setting) -> None:
    """Plot how the gates of the first seed decided, and what widths they left; their runs are in the work folder."""
    for job in jobs_of_pruning(arguments, setting):
        if job.method not in LOGITS or job.seed != arguments.seeds[0]:
            continue
        start = beginning(job, setting)
        learned, name = learn(start, setting, setting.work / start.folder), f"{job.model}-{job.level}-{job.method}"
        widths = layer_widths(learned.result.traced, learned.result.report)
        plot_gates(learned.trail, arguments.plots / f"{name}-gates.png")
        plot_widths(widths, arguments.plots / f"{name}-widths.png")


def sections(arguments: argparse.Namespace, setting: Setting) -> Iterator[str]:
    """Measure, and yield the tables of every part."""
    if "pruning" in arguments.part:
        rows = measure_all(list(jobs_of_pruning(arguments, setting)), setting, arguments.json)
        for name in arguments.models:
            case = case_of(name, setting)
            yield f"### {case.title}\n\nDense: {top1(case, case.model):.2f} %. {case.note}."
            yield pruning_tables([row for row in rows if row.model == name], METHODS)
        if arguments.plots is not None:
            draw(arguments, setting)
    if "distillation" in arguments.part:
        rows = measure_all(list(jobs_of_distillation(arguments, setting)), setting, arguments.json)
        yield f"### Fine-tuning under teachers\n\n{distillation_table(rows, TEACHERS)}"


def main() -> None:
    """Measure, print, and on request write."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    machine = describe_run(("torch", "torchvision", "fxprune", "accelerate"))
    print(machine, file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        setting = setting_of(arguments, arguments.work or Path(scratch))
        shared = f"* seeds {', '.join(map(str, arguments.seeds))}; mean ± half of the range; {setting.all('gates', '')}"
        publish([f"{machine}\n{shared}", *sections(arguments, setting)], arguments.markdown)


if __name__ == "__main__":
    main()
