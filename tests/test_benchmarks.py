"""The zoo's rows survive a stop, and its tables say what the rows say; weight sparsity and learned channels run from
data to table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import learned_channels, weight_sparsity
from benchmarks.cases import augmented
from benchmarks.learned_channels_rows import Job, pruning_tables
from benchmarks.learned_channels_rows import Row as LearnedRow
from benchmarks.learned_channels_runs import budget
from benchmarks.zoo import Limits, watch
from benchmarks.zoo_rows import Row, Rows
from benchmarks.zoo_tables import tables


def row(model: str, tool: str = "fxprune", **more: Any) -> Row:
    measured = {"least_exact": 0.25, "least_statistical": 0.25, "seconds": 0.5, "memory_ratio": 1.5, "macs_left": 0.5}
    return {"suite": "timm", "model": model, "tool": tool, "outcome": "ok", **measured, **more}


def refused(model: str, tool: str = "fxprune") -> Row:
    return {"model": model, "tool": tool, "outcome": "refused", "reason": "TraceError: no | way\n in"}


def test_rows_are_on_disk_at_once_and_are_read_back(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.csv")
    rows.drop(lambda _: False)
    rows.append(row("a", macs=1234))
    rows.append(refused("b"))
    again = Rows(tmp_path / "rows.csv")
    assert ("a", "fxprune") in again
    assert ("a", "torch-pruning") not in again
    assert list(again) == [row("a", macs=1234), refused("b")]


def test_dropped_rows_are_measured_anew(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.csv")
    rows.drop(lambda _: False)
    rows.append(row("a"))
    rows.append(refused("b"))
    rows.drop(lambda r: r["outcome"] != "ok")
    rows.append(row("b", seconds=2.0))
    assert [(r["model"], r["seconds"]) for r in Rows(tmp_path / "rows.csv")] == [("a", 0.5), ("b", 2.0)]


def test_totals_count_float_models_and_both_tools() -> None:
    peer = [row("a", "torch-pruning", seconds=1.0), refused("b", "torch-pruning")]
    text = "\n".join(tables([row("a"), row("b", least_exact=0.75), refused("quantized_c"), *peer]))
    assert "2 models: 2 ok" in text
    assert "half of the MACs can leave exactly: 1 of 2 (50.0%); with statistical orbits: 2 of 2 (100.0%)" in text
    assert "Torch-Pruning slims 1 of 2 (50.0%)" in text
    assert "geometric mean over 1 models that both slim: 0.50" in text


def test_what_is_not_ok_has_its_reason_in_one_cell() -> None:
    text = "\n".join(tables([refused("a")]))
    assert "slimmer and lawful: 0 of 1 (0.0%)" in text
    assert "TraceError: no / way in" in text


def test_a_process_beyond_its_limits_is_killed() -> None:
    def run(code: str, limits: Limits) -> tuple[Row, int]:
        process = subprocess.Popen([sys.executable, "-c", code])
        return watch(process, limits), process.returncode

    forever = "while True: pass"
    assert run(forever, Limits(1e12, 0.0)) == ({"outcome": "timeout", "reason": "more than 0 s"}, -9)
    assert run(forever, Limits(1.0, 1e6)) == ({"outcome": "memory", "reason": "more than 1e-09 GB"}, -9)
    assert run("", Limits(1e12, 1e6)) == ({}, 0)


SOURCE = """
import numpy, torch
from torch import nn

def cifar10(split):
    random = numpy.random.default_rng(0)
    images = random.integers(0, 255, (300, 32, 32, 3), dtype=numpy.uint8)
    return images, (images.mean((1, 2, 3)) > 127).astype(numpy.int64)

def cifar_resnet(depth, pretrained):
    torch.manual_seed(depth)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)).eval()

def normalize_cifar(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
"""


def test_shifted_images_keep_their_pixels() -> None:
    images = [(torch.full((3, 32, 32), float(i + 1)), torch.tensor(i)) for i in range(64)]
    torch.manual_seed(0)
    moved, labels = augmented(images)
    assert labels.tolist() == list(range(64))
    for i, image in enumerate(moved):
        assert set(image.unique().tolist()) <= {0.0, i + 1.0}
        assert (image == i + 1).float().mean() >= (28 / 32) ** 2
    assert len({int((image == 0).sum()) for image in moved}) > 5, "all are shifted alike"


def test_weight_sparsity_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real_data.py").write_text(SOURCE)
    rows = tmp_path / "rows.json"

    def run(methods: str) -> str:
        settings = f"--data {tmp_path} --models resnet20 --methods {methods} --levels 50,80 --epochs 1 --limit 50"
        files = f"--ltp-epochs 2 --json {rows} --work {tmp_path / 'work'}"
        monkeypatch.setattr(sys, "argv", ["weight_sparsity.py", *settings.split(), *files.split()])
        weight_sparsity.main()
        return capsys.readouterr().out

    assert "| uniform  |    50 % |      50.0% |" in run("uniform")
    first = json.loads(rows.read_text())
    assert [(row["method"], row["level"], row["epochs"]) for row in first] == [("uniform", 50, 1), ("uniform", 80, 1)]
    assert "| 1x4 " in run("uniform,1x4,ltp")
    again = json.loads(rows.read_text())
    assert again[:2] == first
    assert {row["method"] for row in again} >= {"uniform", "1x4"}


class LearnedRun:
    """`learned_channels` on small networks: 2 steps of learning, 2 of fine-tuning."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "real_data.py").write_text(SOURCE)
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def __call__(self, options: str) -> str:
        files = f"--data {self.folder} --json {self.folder / 'rows.json'} --work {self.folder / 'work'}"
        small = "--batch-size 30 --learn-batch-size 30 --limit 50"
        usual = f"--models resnet20 --levels 50 --learn-steps 2 --tune-steps 2 {small}"
        self.monkeypatch.setattr(sys, "argv", ["learned_channels.py", *f"{files} {usual} {options}".split()])
        learned_channels.main()
        return self.capsys.readouterr().out

    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads((self.folder / "rows.json").read_text())
        return rows


@pytest.fixture
def learned_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> LearnedRun:
    return LearnedRun(tmp_path, monkeypatch, capsys)


def test_gates_and_criteria_leave_the_same_and_train_for_as_many_steps(learned_run: LearnedRun) -> None:
    text = learned_run("--methods gates,trained,l2,fpgm,taylor --seeds 0")
    rows = learned_run.rows()
    assert [(row["method"], row["learn_steps"], row["tune_steps"]) for row in rows] == [
        ("gates", 2, 2),
        ("trained", 2, 2),
        *((method, 0, steps) for method in ("l2", "fpgm", "taylor") for steps in (2, 4)),
    ]
    assert {row["macs"] for row in rows} == {0.5}
    assert [row["learn_seconds"] > 0 for row in rows] == [True, True, *[False] * 6]
    assert "The MACs of all networks are within 0.00% of their target.\n" in text
    assert text.count("| gates    |     50 % |                2 |              2 |       50.0% |") == 2


def test_learned_channels_go_on_where_they_were(learned_run: LearnedRun) -> None:
    learned_run("--methods gates,l2 --seeds 0")
    first = learned_run.rows()
    assert " ± " in learned_run("--methods l2 --seeds 0,1").partition("Every run")[0]
    second = learned_run.rows()
    assert [(row["method"], row["seed"]) for row in second] == [
        ("gates", 0),
        ("l2", 0),
        ("l2", 0),
        ("l2", 1),
        ("l2", 1),
    ]
    assert second[:3] == first
    learned_run("--methods gates --seeds 0 --gates gate_rate=1")
    assert learned_run.rows()[:5] == second
    assert "gates.gate_rate=1 " in learned_run.rows()[5]["settings"], "rows of other settings are others"


def test_gates_that_are_distilled_learn_once(learned_run: LearnedRun) -> None:
    learned_run("--methods gates --seeds 0")
    text = learned_run("--part distillation --seeds 0")
    rows = learned_run.rows()
    teachers = ["none", "resnet20", "resnet56", "resnet20+resnet56"]
    assert [row["teachers"] for row in rows] == teachers * 2
    assert len({(row["before"], row["learn_seconds"]) for row in rows[:4]}) == 1
    assert [(row["macs"], row["before"] == rows[4]["before"]) for row in rows[4:]] == [(1.0, True)] * 4
    assert "| resnet20, dense, 100.0% | resnet20, then resnet56 |       2 |" in text


def test_epochs_make_up_the_steps_and_two_teachers_can_share_them() -> None:
    for steps, shape in ((2, (2, 1)), (20, (2, 10)), (22, (22, 1)), (24, (4, 6)), (300, (30, 10))):
        training = budget(steps, 1, 10, {})
        assert (training.epochs, training.steps_per_epoch) == shape


def test_networks_of_other_sizes_are_not_compared_in_silence() -> None:
    job = Job("resnet20", 50, "l2", 0, "none", 0, 2, "")
    rows = [
        LearnedRow(**vars(job), **dict.fromkeys(MEASURED, 1.0) | {"macs": macs}, notes=()) for macs in (0.497, 0.45)
    ]
    text = pruning_tables(rows, ("l2",))
    assert "within 10.00% of their target. Not the same within 1%: l2 at 50 % (45.0%).\n" in text


MEASURED = ("macs", "parameters", "before", "recalibrated", "tuned", "learn_seconds", "tune_seconds")
