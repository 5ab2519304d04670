"""`fxprune lower`: what it prints, what it writes, where its data comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import fxprune
from fxprune import api, artifacts
from fxprune.cli import commands
from fxprune.cli import lowering as lowering_command
from fxprune.console import Progress
from fxprune.zoo import ModelSource, build_model

FILE = """
import torch
from torch import nn

def net():
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 16, 4)), torch.rand(1, 3, 6, 6)

def batches():
    for _ in range(2):
        yield torch.rand(2, 3, 6, 6), torch.zeros(2)

def loader():
    return [(torch.rand(2, 3, 6, 6), torch.zeros(2))]

def number():
    return 3

def raising():
    yield torch.rand(1, 3, 6, 6)
    raise KeyError("images")

def nothing():
    return []

def wrong():
    return [torch.rand(1, 4, 6, 6)]
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(FILE)
    return str(tmp_path / "mine.py")


def _call(*arguments: object) -> Any:
    return CliRunner().invoke(commands, ["lower", *(str(argument) for argument in arguments)], prog_name="fxprune")


def _done(*arguments: object) -> str:
    result = _call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_model_is_lowered_saved_and_loaded(file: str, tmp_path: Path) -> None:
    out = tmp_path / "lowered"
    options = ("--calibration", f"{file}:batches", "--sparsity", "50%", "--backend", "native", "--out", out)
    text = _done(f"{file}:net", *options)
    assert "Of 4 layers 2 run native 1x4, 1 run float, 1 run native dense." in text
    assert f"Note: calibrated on {file}:batches" in text
    assert "Note: weights as the callable made them" in text
    assert f"Saved {out}: graph.diff, inputs.json, model.safetensors, plan.json, report.json" in text
    loaded = fxprune.load(out, build_model(ModelSource(f"{file}:net")).model)
    assert {row.runs for row in loaded.lowering} == {"native 1x4", "native dense", "float"}
    shown = CliRunner().invoke(commands, ["show", str(out)]).stdout
    assert "no rule says how a Conv2d computes on uint8" in shown


@pytest.mark.parametrize("options", [(), ("--sparsity", "50%", "--latency")], ids=["dense", "sparse"])
def test_every_stage_of_the_progress_ends_once(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    stages: list[str] = []

    class Recorded(Progress):
        def __init__(self, names: tuple[str, ...], *, quiet: bool) -> None:
            stages.extend(names)
            super().__init__(names, quiet=quiet)

        def advance(self, *given: object) -> None:
            stages.pop(0)
            super().advance(*given)

    monkeypatch.setattr(lowering_command, "Progress", Recorded)
    how = ("--calibration", f"{file}:batches", "--backend", "native", "--out", tmp_path / "lowered")
    _done(f"{file}:net", *how, *options)
    assert stages == ["save"]


def test_every_option_is_obeyed(file: str, tmp_path: Path) -> None:
    out = tmp_path / "lowered"
    options = ["--observer", "min-max", "--layers", "conv1x1", "--exclude", "4", "--block", "2x4", "--seed", "5"]
    options += ["--backend", "2=reference 2x4", "--frontend", "symbolic", "--pt2", "--latency", "--json"]
    facts = json.loads(_done(f"{file}:net", *options, "--calibration", f"{file}:loader", "--out", out))
    rows = {row["layer"]: row["runs"] for row in facts["report"]["lowering"]}
    assert rows == {"0": "float", "2": "reference 2x4", "4": "float", "6": "float"}
    assert all(milliseconds > 0 for milliseconds in facts["report"]["latency_ms"])
    plan = artifacts.read_plan_file(out)
    assert plan.lowering is not None
    assert (plan.seed, plan.lowering.ranges.observer) == (5, "min-max")
    assert (out / "model.pt2").is_file()


def test_larger_kernels_are_computed_on_integers_on_request(file: str, tmp_path: Path) -> None:
    options = ("--calibration", "random", "--backend", "native", "--im2col", "0", "--json")
    facts = json.loads(_done(f"{file}:net", *options, "--out", tmp_path / "lowered"))
    assert facts["report"]["lowering"][0]["runs"] == "native dense"
    assert artifacts.read_plan_file(tmp_path / "lowered").lowering.im2col == ("0",)  # type: ignore[union-attr]


def test_what_is_fastest_is_measured_by_default(file: str, tmp_path: Path) -> None:
    facts = json.loads(_done(f"{file}:net", "--calibration", "random", "--json", "--out", tmp_path / "lowered"))
    assert [bool(row["microseconds"]) for row in facts["report"]["lowering"]] == [False, True, True, True]


def test_random_inputs_are_labelled_and_equal_for_a_seed(file: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        text = _done(f"{file}:net", "--calibration", "random", "--backend", "native", "--out", tmp_path / name)
        assert "Note: calibrated on random inputs: times are right, outputs are not what they would be" in text
    plans = [artifacts.read_plan_file(tmp_path / name) for name in ("a", "b")]
    assert plans[0] == plans[1]
    assert "random inputs" in " ".join(artifacts.read_report(tmp_path / "a").notes)


def test_changes_are_printed_on_request(file: str, tmp_path: Path) -> None:
    options = ("--calibration", "random", "--backend", "native", "--print-changes", "--out", tmp_path / "lowered")
    text = _done(f"{file}:net", *options)
    assert "--- quantization:" in text
    assert "--- block-sparse-int8-lowering:" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --calibration path/to/file.py:callable, which returns or yields batches of real inputs; --calibr"),
        (["--calibration", "mine"], "a source of batches is path/to/file.py:callable"),
        (["--calibration", "{file}:batch"], "has no callable 'batch'; did you mean 'batches'"),
        (["--calibration", "{file}:number"], "number' gives no batches: TypeError: 'int' object is not iterable"),
        (["--calibration", "{file}:raising"], "raising' gives no batches: KeyError: 'images'"),
        (["--calibration", "{file}:nothing"], "no batch was given to calibrate on"),
        (["--calibration", "{file}:wrong"], "batch 0 of the calibration"),
        (["--calibration", "random", "--backend", "fast"], "unknown backend 'fast'"),
        (["--calibration", "random", "--backend", "native", "--backend", "2=onednn"], "need a layer each"),
        (["--calibration", "random", "--backend", "native", "--onnx"], "ONNX has no operator"),
        (["--calibration", "random", "--sparsity", "150%"], "outside"),
        (["--calibration", "random", "--im2col", "conv"], "no layer matches 'conv'"),
        (["--calibration", "random", "--observer", "mean"], "unknown observer 'mean'"),
    ],
)
def test_mistakes_are_one_line(file: str, tmp_path: Path, options: list[str], message: str) -> None:
    result = _call(f"{file}:net", *(option.format(file=file) for option in options), "--out", tmp_path / "lowered")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "lowered").exists()


def test_a_folder_that_is_taken_is_refused_before_the_work(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "lower", pytest.fail)
    result = _call(f"{file}:net", "--calibration", "random", "--out", tmp_path)
    assert "is not empty" in result.stderr


def test_integers_of_random_inputs_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "tokens.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "def net():\n"
        "    layers = nn.Embedding(5, 8), nn.Linear(8, 4)\n"
        "    return nn.Sequential(*layers), torch.full((2, 3), 4)\n"
    )
    options = ("--calibration", "random", "--backend", "native", "--out", tmp_path / "lowered")
    _done(f"{tmp_path / 'tokens.py'}:net", *options)
    loaded = fxprune.load(tmp_path / "lowered", build_model(ModelSource(f"{tmp_path / 'tokens.py'}:net")).model)
    assert loaded.module(torch.tensor([[4, 0, 1]])).shape == (1, 3, 4)
