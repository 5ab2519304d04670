"""README.md tells the truth: its Python runs and prints what is shown, its commands exist and do what is shown."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import tomllib
import types
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fxprune.cli import commands
from passes import PASSES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [(kind, text) for kind, text in re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)]

MODELS = """
from torch import nn, zeros

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), zeros(1, 3, 32, 32)
"""


TASK = """
import torch
from torch.utils.data import TensorDataset

def train():
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, (images[:, 0, 2:-2, 2:-2] > 0.5).long())
"""


def _shown(kind: str) -> list[tuple[str, str]]:
    """Return every block of a kind with the text that is shown as its output."""
    following = [*BLOCKS[1:], ("", "")]
    return [
        (b[1], after[1] if after[0] == "text" else "")
        for b, after in zip(BLOCKS, following, strict=True)
        if b[0] == kind
    ]


def _commands() -> list[str]:
    lines = [line for text, _ in _shown("sh") for line in text.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&")]


def test_the_two_commands_that_everyone_runs_are_there() -> None:
    lines = [text.strip() for text, _ in _shown("sh")]
    assert "pip install . && fxprune prune torchvision:mobilenet_v2 --macs 50% --out slim" in lines
    assert "pip install -e '.[test]' && pytest" in lines


def test_python_blocks_print_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    assert len(_shown("python")) >= 4
    for code, shown in _shown("python"):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "README.md", "exec", dont_inherit=True), vars(module))
        assert printed.getvalue().splitlines() == shown.splitlines()


@pytest.mark.parametrize("line", [line for line in _commands() if line.startswith("fxprune ")])
def test_commands_parse(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    command = commands.commands[name]
    context = command.make_context(name, arguments)
    assert isinstance(context, click.Context)


@pytest.mark.parametrize("line", [line for line in _commands() if line.startswith("pip ")])
def test_extras_exist(line: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in re.findall(r"\[(\w+)\]", line):
        assert extra in project["optional-dependencies"]


_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def _is_close(shown: str, printed: str) -> bool:
    """Compare two lines but for their layout, measured times, versions, and what rounding may decide."""
    if shown.startswith("latency, ms") or "torch " in shown:
        return shown.split()[0] == printed.split()[0] if printed else False
    if "--- " in shown:
        return shown.partition(": ")[0] == printed.partition(": ")[0]
    texts = [" ".join(_NUMBER.sub("#", re.sub(r"-{2,}", "--", line)).split()) for line in (shown, printed)]
    numbers = [[float(n.replace(",", "")) for n in _NUMBER.findall(line)] for line in (shown, printed)]
    return texts[0] == texts[1] and numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=2)


def _assert_shown(printed: str, shown: str) -> None:
    """Every shown line is printed, in order; `[… more]` stands for any number of lines."""
    lines = iter(printed.splitlines())
    for line in shown.splitlines():
        if not line.startswith("[…"):
            assert any(_is_close(line, other) for other in lines), f"README.md shows '{line}', printed was:\n{printed}"


def test_commands_print_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fxprune.cli.pruning.measure_latency", lambda *_: (209.173, 131.510))
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "task.py").write_text(TASK)
    ((recipe, _),) = _shown("toml")
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    ran = 0
    for text, shown in _shown("sh"):
        calls = [part.strip() for line in text.splitlines() for part in line.split("&&") if "fxprune " in part]
        results = [CliRunner().invoke(commands, shlex.split(call)[1:]) for call in calls]
        assert [result.exit_code for result in results] == [0] * len(calls), [result.output for result in results]
        if calls:
            _assert_shown("".join(result.output for result in results), shown)
        ran += len(calls)
    assert ran >= 5


def test_the_table_of_passes_is_complete() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", README, re.MULTILINE)
    assert rows == [kind.name for kind in PASSES]
