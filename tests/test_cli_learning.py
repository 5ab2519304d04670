"""`fxprune learn`: what it prints and writes, what it refuses, and the recipe that its help shows."""

from __future__ import annotations

import functools
import io
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from fxprune import artifacts
from fxprune.api import recipes
from fxprune.cli import learning
from fxprune.insights.widths import stage_table
from fxprune.recipes.folders import Summary
from tests.commands import call, done, mistake

_call, _done, _mistake = (functools.partial(function, "learn") for function in (call, done, mistake))

MODELS = """
import torch
from torch import nn

def net():
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
"""

TASK = """
import torch
from torch.utils.data import TensorDataset

def train():
    images = torch.rand(60, 3, 32, 32)
    return TensorDataset(images, (images[:, 0].mean((1, 2)) > images[:, 1].mean((1, 2))).long())

def loud():
    print("reading")
    return train()
"""

RECIPE = """
[model]
name = "models.py:net"
input = ["1x3x32x32"]
[data]
train = "task.py:train"
held_out = 0.2
[task]
loss = "cross-entropy"
measure = "classification"
[learn]
macs = "50%"
epochs = 1
[finetune]
epochs = 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("recipes")
    (place / "models.py").write_text(MODELS)
    (place / "task.py").write_text(TASK)
    (place / "recipe.toml").write_text(RECIPE)
    return place


@pytest.fixture(scope="module")
def printed(place: Path) -> str:
    return _done("--recipe", place / "recipe.toml", "--out", place / "out")


def test_totals_measures_notes_and_places_are_printed(printed: str, place: Path) -> None:
    rows = {words[0]: words[1:] for line in printed.splitlines() if (words := line.split())}
    summary = Summary.read(place / "out")
    assert summary is not None
    assert rows["MACs"][:2] == [f"{macs:,}" for macs in summary.macs]
    assert f"\n\n{stage_table(summary.stages)}\n\n" in printed
    assert rows["validation"] == ["loss", "accuracy"]
    for stage in ("before", "cut", "fine-tuned"):
        assert rows[stage] == [f"{summary.measures[stage][name]:.4f}" for name in ("loss", "accuracy")]
    notes = artifacts.read_report(place / "out" / "model").notes
    assert [line.removeprefix("Note: ") for line in printed.splitlines() if line.startswith("Note: ")] == list(notes)
    assert "weights as the callable made them" in notes
    assert any("the target is 50.0%" in note for note in notes), "how far the gates were from the target"
    assert rows["Trained:"][::3] == ["learn", "finetune"]
    assert f"Saved {place / 'out'}: finetune, learn, model, recipe.toml, summary.json" in printed


def test_a_finished_run_says_so_and_prints_the_same(printed: str, place: Path) -> None:
    again = _done("--recipe", place / "recipe.toml", "--out", place / "out")
    assert again == printed.replace("Saved", "Had been finished, nothing changed")


def test_json_for_machines(printed: str, place: Path) -> None:  # noqa: ARG001
    facts = json.loads(_done("--recipe", place / "recipe.toml", "--out", place / "out", "--json"))
    assert (facts["out"], facts["was_finished"]) == (str(place / "out"), True)
    assert facts["macs"] == facts["report"]["macs"]
    assert facts.items() >= json.loads((place / "out" / "summary.json").read_text()).items()


def test_a_recipe_can_be_checked_alone(place: Path) -> None:
    (place / "loud.toml").write_text(RECIPE.replace("task.py:train", "task.py:loud"))
    before = set(place.rglob("*"))
    text = _done("--recipe", place / "recipe.toml", "--check")
    assert f"{place / 'recipe.toml'} can be run: one step of learn, finetune went well, nothing was written" in text
    assert "The model has 646,000 MACs and 842 parameters; the target is macs = 50%" in text
    result = _call("--recipe", place / "loud.toml", "--check", "--json")
    assert result.stderr == "reading\n", "what functions of the user's print is no result"
    facts = json.loads(result.stdout)
    assert (facts["macs"], facts["parameters"], facts["target"]) == (646_000, 842, "50%")
    assert facts["stages"] == ["learn", "finetune"]
    assert set(place.rglob("*")) - before <= set(place.glob("__pycache__/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--recipe'"),
        (["--recipe", "{place}/recipe.toml"], "Missing option '--out'; or give --check to try the recipe"),
        (["--recipe", "{place}/no.toml", "--out", "{out}"], "there is no recipe"),
        (["--recipe", "{place}/task.py", "--check"], "task.py' is no TOML: "),
        (
            ["--recipe", "{place}/recipe.toml", "--out", "{place}"],
            "has a recipe.toml that no run put there; give a new folder",
        ),
        (["--recipe", "{place}/bad.toml", "--out", "{out}"], "unknown key learn.epoch; did you mean 'epochs'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(place: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (place / "bad.toml").write_text(RECIPE.replace("epochs = 1", "epoch = 1", 1))
    given = [text.replace("{place}", str(place)).replace("{out}", str(tmp_path / "out")) for text in arguments]
    assert message in _mistake(*given)
    assert not (tmp_path / "out").exists()


def test_an_interruption_is_exit_code_130_and_can_be_gone_on_with(
    printed: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    arguments = ("--recipe", place / "recipe.toml", "--out", tmp_path / "out")
    with monkeypatch.context() as context:
        context.setattr(recipes._Run, "rehearsed", lambda _: None)
        context.setattr(recipes, "train", interrupted)
        result = _call(*arguments)
    assert (result.exit_code, result.stderr.strip()) == (130, "Interrupted")
    table = printed[printed.index("validation") : printed.index("Note")]
    assert table in _done(*arguments), "the run ends as the one that was not interrupted"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_stages_are_named_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, expected in ((_Terminal, "learning …\n"), (io.StringIO, "")):
        terminal = kind()
        monkeypatch.setattr(learning.sys, "stderr", terminal)
        learning._tell("learning")
        assert terminal.getvalue() == expected


def test_the_recipe_of_the_help_runs(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = _done("--help")
    example = textwrap.dedent(text[text.index("    seed = 0") :])
    (place / "example.toml").write_text(
        example.replace("epochs = 5", "epochs = 1").replace("epochs = 40", "epochs = 1")
    )
    torch.save(_trained(place), place / "trained.pt")
    printed = _done("--recipe", place / "example.toml", "--out", tmp_path / "out")
    assert "weights from trained.pt" in printed
    assert "finetune, gates.png, learn, model, recipe.toml, summary.json, widths.png" in printed
    for name in ("widths.png", "gates.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").glob(".*")), "nothing is left half-written"


def _trained(place: Path) -> dict[str, torch.Tensor]:
    state = recipes.build_model(recipes.read_recipe(place / "recipe.toml").recipe.model.source(("1x3x32x32",), 0))
    return state.model.state_dict()
