"""Networks that predict every pixel, pruned by gates with their own losses, beside narrower ones trained as long.

A small U-Net labels the pixels of drawn scenes, and a small denoiser in the manner of PMRID restores drawn raw images.
Each is trained, learns which channels it needs (`fxprune.learn_channels`, with the loss of its task) and is fine-tuned
(gates). Beside it stand networks whose widths are all scaled by one number, trained from scratch for as many epochs as
all of that has (scaled) or fine-tuning alone (scaled, shorter), and the whole network, trained on for as long.

    python -m benchmarks.dense_prediction --json rows.json --work FOLDER
    python -m benchmarks.dense_prediction --tasks denoising --targets 50 --seeds 0 --epochs 1,1,1 --images 64

Rows are written as they are measured; started again with the same `--json` and `--work`, a run goes on where it ended.
Rows of other settings stay in the file and out of the tables.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from benchmarks.dense_prediction_rows import Job, Row, read_rows, summary, table, write_rows
from benchmarks.dense_prediction_tasks import TASKS, Widths, evaluate, macs_of, scaled_widths
from benchmarks.jobs import count_macs
from benchmarks.machine import describe_run, publish
from fxprune import Inputs
from fxprune.training import History, Training, train

HELD = 256
"""Images that loss and metric are taken on."""


@dataclass(frozen=True)
class Setting:
    """What every row of a run shares. `epochs`: of the whole network, of learning channels, of fine-tuning."""

    epochs: tuple[int, int, int]
    images: int
    batch: int
    learning_rate: float
    gate_learning_rate: float
    gates: dict[str, Any]
    work: Path

    def spelled(self) -> str:
        """Return all of it that results depend on."""
        own = f"epochs={self.epochs} images={self.images} batch={self.batch} rate={self.learning_rate}"
        return f"{own} gates={self.gates | {'learning_rate': self.gate_learning_rate}}"


class Bench:
    """A task with its images and a seed: trains networks and measures them."""

    def __init__(self, name: str, seed: int, setting: Setting) -> None:
        self.name, self.seed, self.setting, self.task = name, seed, setting, TASKS[name]
        generator = torch.Generator().manual_seed(0)
        self.seen = TensorDataset(*self.task.draw(setting.images, generator))
        self.held = self.task.draw(HELD, generator)
        self.example = self.held[0][:1]

    def batches(self) -> DataLoader[Any]:
        """Return the training data."""
        return DataLoader(self.seen, self.setting.batch, shuffle=True, drop_last=True)

    def options(self, epochs: int) -> Training:
        """Return how networks are trained."""
        rate = self.setting.learning_rate
        return Training(epochs, rate, optimizer="adamw", tolerance=None, keep_best=False, seed=self.seed)

    def train(self, module: nn.Module, epochs: int, **more: Any) -> float:
        """Train in place with the loss of the task; return how many seconds it took."""
        return seconds_of(train(module, self.batches(), self.task.loss, self.options(epochs), progress=False, **more))

    def built(self, widths: Widths) -> nn.Module:
        """Return an untrained network, the same weights for a seed."""
        torch.manual_seed(self.seed)
        return self.task.build(widths)

    def whole(self) -> tuple[nn.Module, float]:
        """Return the whole network, trained, and the seconds it took; from the folder of the run where it is."""
        network, folder = self.built(self.task.widths), self.setting.work / f"{self.name}-{self.seed}"
        return network, self.train(network, self.setting.epochs[0], folder=folder)

    def row(self, job: Job, module: nn.Module, epochs: int, seconds: float) -> Row:
        """Measure a trained network."""
        macs = count_macs(module, Inputs((self.example,)))
        _, height, width = self.task.shape
        left = macs / macs_of(self.name, self.task.widths)
        found = evaluate(self.task, module, self.held)
        return Row(job, macs / (height * width) / 1000, left, None, None, *found, epochs, seconds)


def seconds_of(history: History) -> float:
    """Return how long the epochs of a run took."""
    return sum(record.seconds for record in history.records)


def whole_row(bench: Bench, job: Job) -> Row:
    """Measure the network that others start from."""
    network, seconds = bench.whole()
    return bench.row(job, network, bench.setting.epochs[0], seconds)


def longer_row(bench: Bench, job: Job) -> Row:
    """Train the whole network on for as long as others learn their channels and are fine-tuned."""
    network, seconds = bench.whole()
    seconds += bench.train(network, sum(bench.setting.epochs[1:]))
    return bench.row(job, network, sum(bench.setting.epochs), seconds)


def gates_row(bench: Bench, job: Job) -> Row:
    """Learn channels, cut and fine-tune."""
    setting = bench.setting
    network, seconds = bench.whole()
    learned = fxprune.learn_channels(
        network,
        bench.example,
        bench.batches(),
        bench.task.loss,
        replace(bench.options(setting.epochs[1]), learning_rate=setting.gate_learning_rate, schedule="constant"),
        macs=job.target / 100,
        **setting.gates,
    )
    module, last = learned.result.module, learned.history.records[-1]
    cut, _ = evaluate(bench.task, module, bench.held)
    seconds += seconds_of(learned.history) + bench.train(module, setting.epochs[2])
    row = bench.row(job, module, sum(setting.epochs), seconds)
    return replace(row, alone=last.extras["hard_macs"], cut=cut)


def scaled_row(bench: Bench, job: Job) -> Row:
    """Train a narrower network from scratch, as long as the others in all."""
    return _from_scratch(bench, job, sum(bench.setting.epochs))


def shorter_row(bench: Bench, job: Job) -> Row:
    """Train a narrower network from scratch, as long as the others are fine-tuned."""
    return _from_scratch(bench, job, bench.setting.epochs[2])


def _from_scratch(bench: Bench, job: Job, epochs: int) -> Row:
    network = bench.built(scaled_widths(bench.name, job.target / 100))
    return bench.row(job, network, epochs, bench.train(network, epochs))


METHODS: dict[str, Callable[[Bench, Job], Row]] = {
    "whole": whole_row,
    "whole, trained on": longer_row,
    "gates": gates_row,
    "scaled": scaled_row,
    "scaled, shorter": shorter_row,
}


def jobs_of(name: str, seed: int, targets: tuple[int, ...], setting: Setting) -> Iterator[Job]:
    """Yield all networks of a task and a seed."""
    for method in METHODS:
        for target in (100,) if method.startswith("whole") else targets:
            yield Job(name, seed, method, target, setting.spelled())


def measure_all(arguments: argparse.Namespace, setting: Setting) -> list[Row]:
    """Measure what the file of rows lacks, and add it; return the rows of these settings."""
    rows = read_rows(arguments.json)
    wanted = []
    for name, seed in itertools.product(arguments.tasks, arguments.seeds):
        jobs = list(jobs_of(name, seed, arguments.targets, setting))
        wanted += jobs
        known = {row.job for row in rows}
        if known.issuperset(jobs):
            continue
        bench = Bench(name, seed, setting)
        for job in jobs:
            if job not in known:
                rows.append(METHODS[job.method](bench, job))
                print(rows[-1], file=sys.stderr)
                write_rows(arguments.json, rows)
    return [row for row in rows if row.job in wanted]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(",")))

    parser.add_argument("--tasks", type=lambda text: text.split(","), default=",".join(TASKS))
    parser.add_argument("--targets", type=numbers, default="75,50,25", help="percent of the MACs to leave")
    parser.add_argument("--seeds", type=numbers, default="0,1")
    parser.add_argument("--epochs", type=numbers, default="5,5,5", help="at first, of learning, of fine-tuning")
    parser.add_argument("--images", type=int, default=1024, help=f"to train on; {HELD} others are held out")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--gate-learning-rate", type=float, default=1e-3, help="of weights while channels are learned")
    parser.add_argument("--gate-rate", type=float, default=10.0, help="of the gates, over that")
    parser.add_argument("--cost-weight", type=float, default=1.0)
    parser.add_argument("--entropy-weight", type=float, default=0.1)
    parser.add_argument("--logits", default="predicted", help="predicted or trained")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, kept and added to")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where whole networks are kept; else temporary")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and on request write."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(
            arguments.epochs,
            arguments.images,
            arguments.batch,
            arguments.learning_rate,
            arguments.gate_learning_rate,
            {name: getattr(arguments, name) for name in ("gate_rate", "cost_weight", "entropy_weight", "logits")},
            arguments.work or Path(scratch),
        )
        rows = measure_all(arguments, setting)
    parts = [describe_run(("torch", "fxprune", "accelerate"))]
    for name in arguments.tasks:
        found = [row for row in rows if row.job.task == name]
        parts += [f"### {TASKS[name].title}", table(found, list(METHODS), TASKS[name].unit), summary(found)]
    publish(parts, arguments.markdown)


if __name__ == "__main__":
    main()
