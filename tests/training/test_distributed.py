"""Two processes on one CPU, started by torchrun as `accelerate launch` starts those on GPUs, train as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxprune.errors import ArtifactError
from fxprune.training import classification, train
from tests.training.tasks import Jittered, assert_same_state, exact_loader, masked_net
from tests.training.two_processes import OPTIONS, exact_loss, smooth_net, train_masked

ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-processes")
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(Path(__file__).with_name("two_processes.py")), str(folder)]
    done = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ends(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"process-{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("run", ["whole", "resumed", "exact", "listed", "unvalidated", "gated"])
def test_both_processes_end_alike(ends: list[dict[str, Any]], run: str) -> None:
    """Parameters, and also the running statistics that each process gathers on its own share."""
    assert_same_state(ends[0][run], ends[1][run])


def test_an_interrupted_run_ends_as_if_it_had_not_been(ends: list[dict[str, Any]]) -> None:
    assert_same_state(ends[0]["resumed"], ends[0]["whole"])


@pytest.mark.parametrize(
    ("run", "batches"),
    [("exact", exact_loader(48, 8, shuffle=True)), ("listed", list(exact_loader(52, 8))[:6])],
    ids=["loader", "list"],
)
def test_two_batches_of_four_are_one_of_eight(ends: list[dict[str, Any]], run: str, batches: Any) -> None:
    """Of the thirteen batches of the list the last is left out, since it has no partner."""
    module = smooth_net()
    train(module, batches, exact_loss, OPTIONS)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, ends[0][run][name], rtol=1e-10, atol=1e-12)


def test_masked_weights_stay_zero(ends: list[dict[str, Any]]) -> None:
    module = masked_net()
    module.load_state_dict(ends[0]["whole"])
    mask = module[0].parametrizations.weight[0].mask
    assert not mask.all()
    assert torch.all(module[0].weight[~mask] == 0)
    assert not torch.equal(module[0].weight, masked_net()[0].weight)


def test_every_validation_sample_weighs_the_same(ends: list[dict[str, Any]]) -> None:
    """21 samples in batches of 5: one process gets three batches, the other two."""
    module = masked_net().eval()
    module.load_state_dict(ends[0]["whole"])
    data = Jittered(21)
    with torch.no_grad():
        expected = {
            name: value.mean().item() for name, value in classification(module, (data.points, data.labels)).items()
        }
    assert ends[0]["measures"] == ends[1]["measures"] == pytest.approx(expected, rel=1e-5)


def test_one_log_is_written(folder: Path) -> None:
    assert {path.name for path in (folder / "whole").iterdir()} == {"checkpoint.pt", "log.csv", "log.json"}
    log = json.loads((folder / "whole" / "log.json").read_text())
    assert [(row["epoch"], row["step"]) for row in log["epochs"]] == [(1, 6), (2, 12), (3, 18)]


def test_another_number_of_processes_is_refused(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="steps of an epoch was 6, is now 12; processes was 2, is now 1"):
        train_masked(masked_net(), folder / "whole", None)
