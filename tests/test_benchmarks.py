"""The zoo's rows survive a stop, and its tables say what the rows say; weight sparsity, learned channels and dense
prediction run from data to table; what gates cost is taken apart, and exact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import dense_prediction, dense_prediction_tasks, gate_cost, learned_channels, weight_sparsity
from benchmarks.cases import augmented
from benchmarks.dense_prediction_rows import Job as DenseJob
from benchmarks.dense_prediction_rows import Row as DenseRow
from benchmarks.dense_prediction_rows import read_rows, summary, table
from benchmarks.learned_channels_rows import Job, pruning_tables
from benchmarks.learned_channels_rows import Row as LearnedRow
from benchmarks.learned_channels_runs import budget
from benchmarks.zoo import Limits, watch
from benchmarks.zoo_rows import Row, Rows
from benchmarks.zoo_tables import tables
from fxprune.latency import Times


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
    text = learned_run(f"--methods gates,trained,l2,fpgm,taylor --seeds 0 --plots {learned_run.folder}")
    pictures = {f"resnet20-50-{method}-{what}.png" for method in ("gates", "trained") for what in ("gates", "widths")}
    assert pictures < {path.name for path in learned_run.folder.iterdir()}
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


def test_dense_prediction_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: str) -> str:
        usual = "--tasks denoising --targets 50 --epochs 1,1,2 --images 16 --batch 8"
        files = f"--json {tmp_path / 'rows.json'} --work {tmp_path / 'work'}"
        monkeypatch.setattr(dense_prediction, "HELD", 16)
        monkeypatch.setattr(sys, "argv", ["dense_prediction.py", *f"{usual} {files} {options}".split()])
        dense_prediction.main()
        return capsys.readouterr().out

    run("--seeds 0")
    first = read_rows(tmp_path / "rows.json")
    assert [(row.job.method, row.job.target, row.epochs) for row in first] == [
        ("whole", 100, 1),
        ("whole, trained on", 100, 4),
        ("gates", 50, 4),
        ("scaled", 50, 4),
        ("scaled, shorter", 50, 2),
    ]
    assert [row.left for row in first[:2]] == [1.0, 1.0]
    assert all(abs(row.off) < 1 for row in first)
    assert [row.alone is None for row in first] == [True, True, False, True, True]
    assert len({row.loss for row in first}) == 5, "networks are the same"
    text = run("--seeds 0 --gate-rate 3")
    again = read_rows(tmp_path / "rows.json")
    assert again[:5] == first
    assert again[5].loss == first[0].loss, "the whole network is another, though nothing of it is"
    assert again[7].loss != first[2].loss, "gates learn at another rate"
    assert " to " not in text, "rows of other settings are in the table"
    assert "cut at a probability of 0.5" in text


def dense_row(
    method: str, target: int, left: float, loss: float, alone: float | None = None, seed: int = 0
) -> DenseRow:
    return DenseRow(DenseJob("denoising", seed, method, target, ""), 1.0, left, alone, None, loss, 20.0, 3, 1.0)


def test_dense_tables_say_what_the_rows_say() -> None:
    rows = [
        dense_row("gates", 50, 0.49, 0.1, alone=0.55),
        dense_row("gates", 50, 0.5, 0.3, alone=0.5, seed=1),
        dense_row("scaled", 50, 0.505, 0.2),
        dense_row("scaled", 50, 0.505, 0.2, seed=1),
        dense_row("whole", 100, 1.0, 0.1),
    ]
    lines = table(rows, ["whole", "gates", "scaled"], "PSNR, dB").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["whole", "gates", "scaled"]
    assert "-1.00 (-2.00 to +0.00)" in lines[3]
    assert "0.2000 (0.1000 to 0.3000)" in lines[3]
    assert "| PSNR, dB |" in lines[0].replace("  ", "")
    said = summary(rows)
    assert "within 2.00 % of their targets" in said
    assert "within 10.0 %" in said
    assert 'that of "scaled" in 1 of 2 pairs' in said
    assert summary(rows[2:]) == ""


@pytest.mark.parametrize(("name", "share"), [("segmentation", 0.75), ("denoising", 0.25)])
def test_narrower_networks_are_scaled_alike(name: str, share: float) -> None:
    task = dense_prediction_tasks.TASKS[name]
    widths = dense_prediction_tasks.scaled_widths(name, share)
    left = dense_prediction_tasks.macs_of(name, widths) / dense_prediction_tasks.macs_of(name, task.widths)
    assert left == pytest.approx(share, rel=0.02)
    least = max((width - 1) / whole for width, whole in zip(widths, task.widths, strict=True))
    most = min((width + 1) / whole for width, whole in zip(widths, task.widths, strict=True))
    assert least < most, "no one number scales to these widths"


def test_drawn_images_are_what_they_say() -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    images, labels = dense_prediction_tasks.scenes(64, generator())
    assert images.shape == (64, 3, 64, 64)
    assert torch.equal(labels.unique(), torch.arange(4))
    assert torch.equal(dense_prediction_tasks.scenes(64, generator())[0], images)
    plain, textured = (images[:, 0][labels == kind] for kind in (1, 2))
    assert textured.var() > plain.var() + 0.05, "stripes are missing"
    noisy, clean = dense_prediction_tasks.raw_pairs(64, generator())
    assert clean.min() >= 0
    assert clean.max() <= 1
    noise = noisy - clean
    assert abs(float(noise.mean())) < 0.005
    assert noise[clean > 0.8].var() > 1.2 * noise[clean < 0.2].var(), "shot noise grows with the light"


def test_metrics_are_those_of_the_books() -> None:
    labels = torch.tensor([[[0, 0, 1, 1]]])
    logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1, 1]]]), 2).movedim(-1, 1).float()
    assert dense_prediction_tasks.mean_iou(logits, labels) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    clean = torch.zeros(2, 1, 2, 2)
    off = torch.tensor([0.1, 0.01]).view(2, 1, 1, 1).expand_as(clean)
    assert dense_prediction_tasks.psnr(off, clean) == pytest.approx((20 + 40) / 2, rel=1e-5)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1"])
def test_decided_gates_cost_what_they_keep(name: str) -> None:
    found = gate_cost.exactness(name, 64, draws=2)
    assert abs(found.expected) <= 1e-12
    assert abs(found.counted) <= 1e-12
    assert 0 < found.kept[0] < found.kept[1] < found.whole


def test_steps_with_gates_are_timed_part_by_part() -> None:
    times = gate_cost.time_steps("squeezenet1_1", size=32, batch=2, rounds=1, warmup=0)
    assert list(times) == list(gate_cost.VARIANTS)
    assert all(found.median > 0 for found in times.values())
    ladder = [Times((100.0 * 1.2**i, 200.0 * 1.2**i)) for i in range(len(gate_cost.VARIANTS))]
    drawn = dict(zip(gate_cost.VARIANTS, ladder, strict=True))
    assert "| constant masks               |          180 |      150 to 210 |                     1.200 |" in (
        gate_cost.step_table(drawn)
    )
    multiplying = gate_cost.parts_table(drawn).splitlines()[2]
    assert "constant masks − no gates" in multiplying
    assert "+30.0 |  +25.0 to +35.0 |" in multiplying
    assert "+20.0%" in multiplying


def test_variants_add_one_thing_at_a_time() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 3))
    network = torch.nn.Sequential(model, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    batch = torch.randn(4, 3, 8, 8), torch.randint(0, 4, (4,))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for name, variant in gate_cost.VARIANTS.items():
        gate_cost.step_of(network, variant, batch)()
        assert variant.beyond in ("", *gate_cost.VARIANTS), name
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
