"""The trace: what is in it, that it survives a kill, and how a checkpoint is chosen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.checkpoint import load_checkpoint
from fxprune.errors import ArtifactError, TargetError, UsageError
from fxprune.training import Hook, Moment, classification, cross_entropy, train
from fxprune.training.learned_thresholds import LearnedThresholds, hard_state
from fxprune.training.traces import Checkpoint, Trace
from tests.training.thresholded import SETTINGS, Net, batches, moment, raise_thresholds, run, thresholded


def test_a_trace_holds_ever_sparser_networks_as_they_were_measured(tmp_path: Path) -> None:
    model, hook, _ = run(tmp_path, growth=0.1, interval=1)
    trace = Trace.read(tmp_path)
    assert trace == hook.trace
    levels = [one.sparsity for one in trace.checkpoints]
    assert len(levels) > 3
    assert levels[:-1] == sorted(levels[:-1])
    assert len({int(level / 0.1 + 1e-9) for level in levels[:-1]}) == len(levels) - 1
    assert trace.checkpoints[0].step == 0
    assert trace.checkpoints[-1].step == 32
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(one.path.name for one in trace.checkpoints),
        "trace.json",
    ]
    data = batches()[:2]
    for one in trace.checkpoints:
        plain = Net()
        load_checkpoint(plain, one.path)
        plain.eval()
        with torch.no_grad():
            accuracy = torch.cat([classification(plain, batch)["accuracy"] for batch in data]).mean()
        assert one.measures["accuracy"] == pytest.approx(float(accuracy))
        masks = one.masks()
        zeros = {name: 1 - float(mask.double().mean()) for name, mask in masks.items()}
        assert zeros == pytest.approx(dict(one.layers))
        total = sum(mask.numel() for mask in masks.values())
        assert one.sparsity == pytest.approx(sum(zeros[name] * mask.numel() for name, mask in masks.items()) / total)
    last = hard_state(model)
    assert all(torch.equal(value, last[name]) for name, value in plain.state_dict().items())


def test_training_goes_on_as_if_nothing_had_been_measured(tmp_path: Path) -> None:
    often, *_ = run(tmp_path / "often", growth=0.01, interval=1)
    seldom, *_ = run(tmp_path / "seldom", growth=1.0)
    theirs = seldom.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in often.state_dict().items())


class Kill(Hook):
    """Ends the process, as it were, at a step."""

    name = "kill"

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, module: nn.Module, moment: Moment) -> None:  # noqa: ARG002
        if moment.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [3, 21])
def test_a_killed_run_ends_with_the_trace_that_it_would_have_had(tmp_path: Path, step: int) -> None:
    whole, *_ = run(tmp_path / "whole", Kill(-1), growth=0.05, interval=1)
    for at in (step, -1):
        try:
            again, *_ = run(tmp_path / "killed", Kill(at), resumable=tmp_path / "run", growth=0.05, interval=1)
        except KeyboardInterrupt:
            assert at == step
    assert _rows(tmp_path / "killed") == _rows(tmp_path / "whole")
    theirs = whole.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in again.state_dict().items())


def _rows(folder: Path) -> list[Any]:
    """Return the index, and the bytes of the files that are there."""
    return [json.loads((folder / "trace.json").read_text())["checkpoints"]] + [
        (path.name, path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))
    ]


def test_files_of_an_abandoned_future_go_away(tmp_path: Path) -> None:
    model, measure = thresholded(), dict
    hook = LearnedThresholds(tmp_path, interval=1)
    hook.before_epoch(model, moment(0, measure))
    state = hook.state_dict()
    raise_thresholds(model, 0.5)
    hook.after_step(model, moment(7, measure))
    assert [one.step for one in Trace.read(tmp_path).checkpoints] == [0, 7]
    resumed = LearnedThresholds(tmp_path, interval=1)
    resumed.load_state_dict(state)
    assert [one.step for one in resumed.trace.checkpoints] == [0]
    resumed.after_step(model, moment(8, measure))
    assert [one.step for one in Trace.read(tmp_path).checkpoints] == [0, 8]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_trace_of_another_run_is_not_overwritten(tmp_path: Path) -> None:
    model = thresholded()
    LearnedThresholds(tmp_path).before_epoch(model, moment(0, dict))
    before = _rows(tmp_path)
    with pytest.raises(ArtifactError, match="trace of another run"):
        LearnedThresholds(tmp_path).before_epoch(model, moment(0, dict))
    assert _rows(tmp_path) == before


def test_without_validation_data_training_says_so_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="validation"):
        train(thresholded(), batches(1), cross_entropy, SETTINGS, hooks=[LearnedThresholds(tmp_path)], progress=False)


def _trace(folder: Path, rows: Sequence[tuple[float, float]]) -> Trace:
    made = [
        Checkpoint(folder / f"{step}.safetensors", step, 1, sparsity, {}, {"accuracy": accuracy})
        for step, (sparsity, accuracy) in enumerate(rows)
    ]
    return Trace(folder, "run", tuple(made))


def test_a_checkpoint_is_chosen_by_sparsity_or_by_measure(tmp_path: Path) -> None:
    trace = _trace(tmp_path, [(0.0, 0.95), (0.5, 0.93), (0.8, 0.89), (0.85, 0.91), (0.85, 0.92), (0.9, 0.8)])
    assert trace.at(sparsity=0.5).step == 1
    assert trace.at(sparsity=0.81).step == 4  # the later of equals
    assert trace.at_least(accuracy=0.9).step in (3, 4)
    assert trace.at_least(accuracy=0.94).step == 0
    with pytest.raises(TargetError, match=r"has a sparsity of 0\.95; the highest is 0\.9000"):
        trace.at(sparsity=0.95)
    with pytest.raises(TargetError, match=r"reaches accuracy 0\.99; the best are accuracy 0\.95"):
        trace.at_least(accuracy=0.99)
    with pytest.raises(TargetError, match="no measure 'acuracy'; did you mean 'accuracy'"):
        trace.at_least(acuracy=0.9)
    with pytest.raises(TargetError, match="no checkpoint"):
        Trace.read(tmp_path / "nothing").at_least(accuracy=0.5)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 9}', '{"schema": 1, "run": "", "checkpoints": [{}]}'])
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"trace\.json' is not the index of a trace"):
        Trace.read(tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (one,) = _trace(tmp_path, [(0.5, 0.9)]).checkpoints
    with pytest.raises(ArtifactError, match=r"0\.safetensors' cannot be read"):
        one.masks()
    one.path.write_bytes(b"short")
    with pytest.raises(ArtifactError, match=r"0\.safetensors' cannot be read"):
        one.masks()
