"""`fxprune bench`: what it prints, for people and for machines, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fxprune.cli import commands

MODELS = """
import torch
from torch import nn

def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.rand(1, 3, 12, 12)

def shapeless():
    return nn.Linear(3, 4)
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "models.py").write_text(MODELS)
    return f"{tmp_path / 'models.py'}:net"


def _call(*arguments: str) -> Result:
    return CliRunner().invoke(commands, ["bench", *arguments, "--runs", "2", "--warmup", "0"], prog_name="fxprune")


def _done(*arguments: str) -> str:
    result = _call(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def test_it_prints_times_machine_and_kinds_of_layers(model: str) -> None:
    text = _done(model, "--variants", "eager, lowered", "--threads", "1")
    rows = [line.split()[0] for line in text.splitlines() if line]
    assert rows[2:4] == ["eager", "lowered"]
    assert "2 runs of each in alternation after 0, 1 thread, on " in text
    assert "torch " in text
    assert "eager, by kind" in text
    assert "call by call" not in text
    assert text.endswith("Note: weights as the callable made them\n")


def test_it_prints_every_call_on_request(model: str) -> None:
    text = _done(model, "--variants", "eager", "--layers").partition("call by call")[2]
    assert [line.split()[1] for line in text.splitlines()[2:5]] == ["Conv2d", "ReLU", "Conv2d"]


def test_it_speaks_to_machines(model: str) -> None:
    options = ("--sparsity", "60%", "--sparsity", "0", "--memory-format", "contiguous", "--threads", "2")
    facts = json.loads(_done(model, "--variants", "eager,lowered", *options, "--json"))
    assert [row["variant"] for row in facts["variants"]] == ["eager", "lowered 60%", "lowered 0%"]
    assert facts["variants"][0]["memory_format"] == "contiguous"
    assert facts["variants"][0]["median_ms"] > 0
    assert (facts["model"], facts["threads"]) == (model, 2)
    assert [row["kind"] for row in facts["layers"][0]["layers"]] == ["Conv2d", "ReLU", "Conv2d"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--variants", "eagre"), "unknown variant 'eagre'; did you mean 'eager'?"),
        (("--variants", ","), "no variant to measure"),
        (("--sparsity", "all"), "sparsity"),
        (("--threads", "0"), "give at least 1"),
        (("--memory-format", "nhwc"), "unknown memory format 'nhwc'; known: auto, contiguous, channels-last"),
        (("--frontend", "magic", "--variants", "eager"), "unknown front end 'magic'"),
    ],
)
def test_mistakes_are_named(model: str, options: tuple[str, ...], message: str) -> None:
    result = _call(model, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_model_needs_inputs(model: str) -> None:
    result = _call(model.replace(":net", ":shapeless"))
    assert result.exit_code == 2
    assert "give --input" in result.stderr
