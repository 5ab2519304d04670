"""A run that is killed and started again ends with what it would have ended with, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, WeightedRandomSampler

from fxprune.errors import ArtifactError, InputError, SpecError
from fxprune.training import History, Hook, Moment, Record, Training, cross_entropy, train
from tests.training.tasks import (
    Interrupt,
    Jittered,
    assert_same_state,
    exact_loader,
    loader,
    masked_net,
    net,
    state,
    untimed,
)

OPTIONS = Training(4, 0.1, smoothing=0.5, tolerance=1e-6, keep_best=False)


class Remember(Hook):
    """Keeps a state of its own that decides the loss: a running mean of a weight, and a list of epochs."""

    name = "remember"

    def __init__(self) -> None:
        self.mean = torch.zeros(())
        self.epochs: list[int] = []

    def penalty(self, module: nn.Module, moment: Moment) -> Tensor:
        return moment.fraction * (module.get_parameter("6.bias").sum() - self.mean - len(self.epochs)) ** 2

    def after_step(self, module: nn.Module, moment: Moment) -> None:  # noqa: ARG002
        self.mean = 0.9 * self.mean + 0.1 * module.get_parameter("6.bias").detach().sum()

    def after_epoch(self, module: nn.Module, moment: Moment, record: Record) -> bool:  # noqa: ARG002
        self.epochs.append(record.epoch)
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.epochs = state["mean"], list(state["epochs"])


def seeded_loader() -> DataLoader[Any]:
    return loader(generator=torch.Generator().manual_seed(7))


def weighted_loader() -> DataLoader[Any]:
    sampler = WeightedRandomSampler([1.0, 2.0] * 20, 40, generator=torch.Generator().manual_seed(7))
    return DataLoader(Jittered(40), 8, sampler=sampler)


def run(
    module: nn.Module,
    folder: Path | None,
    interrupted: int | None = None,
    options: Training = OPTIONS,
    batches: Callable[[], DataLoader[Any]] = loader,
) -> History:
    hooks = [Remember(), Interrupt(interrupted)]
    return train(module, batches(), cross_entropy, options, validation=exact_loader(20, 8), hooks=hooks, folder=folder)


def interrupt(module: nn.Module, folder: Path, step: int, **other: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(module, folder, step, **other)


@pytest.mark.parametrize("step", [1, 5, 6, 13, 20])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path: Path, step: int) -> None:
    """Epochs end at steps 5, 10, 15 and 20; what comes after the last checkpoint is done again."""
    whole, cut = masked_net(), masked_net()
    expected = run(whole, None)
    interrupt(cut, tmp_path, step)
    other = masked_net(9)
    torch.rand(17)
    history = run(other, tmp_path)
    assert_same_state(state(other), state(whole))
    assert untimed(history) == untimed(expected)
    assert (history.stopped_by, history.best_epoch) == (expected.stopped_by, expected.best_epoch)


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        (Training(3, 0.01, "adamw", keep_best=True), loader),
        (Training(3, 0.1, nesterov=True, schedule="constant", steps_per_epoch=4), seeded_loader),
        (Training(3, 0.1, mixed_precision="bf16", clip_norm=0.5), weighted_loader),
        (Training(3, 0.1), lambda: loader(num_workers=1, generator=torch.Generator().manual_seed(7))),
    ],
    ids=["adamw", "seeded-loader", "bf16-weighted-loader", "worker"],
)
def test_with_other_options_too(tmp_path: Path, options: Training, batches: Callable[[], DataLoader[Any]]) -> None:
    whole, cut = net(), net()
    expected = run(whole, None, options=options, batches=batches)
    interrupt(cut, tmp_path, 7, options=options, batches=batches)
    history = run(cut, tmp_path, options=options, batches=batches)
    assert_same_state(state(cut), state(whole))
    assert untimed(history) == untimed(expected)


KILLED = """
import os, sys
from fxprune.training import Hook
from tests.training import test_resuming
from tests.training.tasks import Interrupt, masked_net
Interrupt.after_step = lambda self, module, moment: os._exit(9) if moment.step == 13 else None
test_resuming.run(masked_net(), sys.argv[1])
"""


def test_a_killed_process_is_continued(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], env=environment, check=False)
    assert killed.returncode == 9
    assert len(json.loads((folder / "log.json").read_text())["epochs"]) == 2
    whole, resumed = masked_net(), masked_net()
    expected = run(whole, None)
    assert untimed(run(resumed, folder)) == untimed(expected)
    assert_same_state(state(resumed), state(whole))


def test_a_kill_while_the_checkpoint_is_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = net(), net()
    expected = run(whole, None)
    save = torch.save
    written = []

    def tear(value: Any, file: Any) -> None:
        written.append(value)
        if len(written) < 4:
            save(value, file)
        else:
            file.write(b"half a checkpoint")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", tear)
        with pytest.raises(KeyboardInterrupt):
            run(cut, tmp_path)
    log = tmp_path / "log.csv"
    log.write_text("stale")
    assert untimed(run(cut, tmp_path)) == untimed(expected)
    assert_same_state(state(cut), state(whole))
    assert log.read_text().count("\n") == 5
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "log.csv", "log.json"}


def test_the_log_is_right_at_once_after_resuming(tmp_path: Path) -> None:
    interrupt(net(), tmp_path, 11)
    good = (tmp_path / "log.csv").read_text()
    (tmp_path / "log.csv").write_text("stale")
    interrupt(net(), tmp_path, 11)
    assert (tmp_path / "log.csv").read_text() == good
    assert good.count("\n") == 3


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    options = Training(4, 0.5, tolerance=None)
    module, again = net(), net(5)
    history = run(module, tmp_path, options=options)
    assert history.best_epoch is not None
    assert run(again, tmp_path, interrupted=1, options=options) == history
    assert_same_state(state(again), state(module))


def test_a_loss_that_is_not_finite_leaves_the_checkpoint(tmp_path: Path) -> None:
    interrupt(net(), tmp_path, 8)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def broken(module: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(module, batch) / 0

    with pytest.raises(InputError, match="the loss is inf at step 6 of 20"):
        train(
            net(),
            loader(),
            broken,
            OPTIONS,
            validation=exact_loader(20, 8),
            hooks=[Remember(), Interrupt(None)],
            folder=tmp_path,
        )
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": Training(5, 0.1)}, "other settings: epochs was 4, is now 5; tolerance was 1e-06, is now 0.0001"),
        ({"batches": loader(16)}, "steps of an epoch was 5, is now 2"),
        ({"hooks": [Remember()]}, r"hooks was \['remember', 'interrupt'\], is now \['remember'\]"),
        ({"validation": None}, "validation was True, is now False"),
        ({"module": nn.Sequential(*net(), nn.Linear(2, 2))}, r"trains another module \(RuntimeError: .*give that one"),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    interrupt(net(), tmp_path, 8)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    given = {
        "module": net(),
        "batches": loader(),
        "loss": cross_entropy,
        "options": OPTIONS,
        "validation": exact_loader(20, 8),
        "hooks": [Remember(), Interrupt(None)],
        "folder": tmp_path,
        **arguments,
    }
    with pytest.raises(ArtifactError, match=message):
        train(**given)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "foreign", "format"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    module = net()
    interrupt(module, tmp_path, 8)
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    saved = torch.load(path, weights_only=True)
    if damage == "flipped":
        weight = saved["module"]["0.weight"].numpy().tobytes()
        at = content.index(weight) + len(weight) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        torch.load(path, weights_only=True)  # torch by itself does not see it
    elif damage == "format":
        torch.save({**saved, "format": 0}, path)
    else:
        path.write_bytes({"empty": b"", "truncated": content[:-100], "foreign": b"no checkpoint"}[damage])
    expected = (
        "written by another version of fxprune" if damage == "format" else r"is damaged \(.*\); remove the folder"
    )
    before = state(module)
    with pytest.raises(ArtifactError, match=expected):
        run(module, tmp_path)
    assert_same_state(state(module), before)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot train in '.*file': File exists; give a folder you may write"):
        run(net(), tmp_path / "file")
    (tmp_path / "run" / ".checkpoint.pt.aside").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"cannot write '.*checkpoint.pt': Is a directory"):
        run(net(), tmp_path / "run")
    (tmp_path / "log.csv").write_text("precious")
    with pytest.raises(ArtifactError, match=r"has a log.csv but no checkpoint.pt, so it is no run to resume"):
        run(net(), tmp_path)
    assert (tmp_path / "log.csv").read_text() == "precious"


def test_a_state_that_could_not_be_read_back_is_refused_at_once(tmp_path: Path) -> None:
    class Careless(Hook):
        name = "careless"

        def state_dict(self) -> dict[str, Any]:
            return {"when": {1: [Path()]}}

    with pytest.raises(SpecError, match=r"the state of hook 'careless' holds a PosixPath; return tensors, numbers"):
        train(net(), loader(), cross_entropy, OPTIONS, hooks=[Careless()], folder=tmp_path)
