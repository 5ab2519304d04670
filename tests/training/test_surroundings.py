"""What a run shows while it trains, and what it leaves behind."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.errors import UsageError
from fxprune.graph.tracing import trace
from fxprune.training import Hook, Moment, Training, classification, cross_entropy, train
from tests.training.tasks import (
    Interrupt,
    loader,
    net,
    state,
)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("step", [None, 3], ids=["finished", "interrupted"])
def test_all_but_the_weights_is_as_it_was(mixed_precision: str, step: int | None) -> None:
    module = trace(net(), torch.zeros(2, 6))
    module.get_submodule("1").eval()
    modes = {name: part.training for name, part in module.named_modules()}
    before, attributes = state(module), set(module.__dict__)
    batches = loader()
    sampler = batches.batch_sampler.sampler  # type: ignore[union-attr]
    try:
        train(module, batches, cross_entropy, Training(1, mixed_precision=mixed_precision), hooks=[Interrupt(step)])
    except KeyboardInterrupt:
        assert step is not None
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert batches.batch_sampler.sampler is sampler  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in module.parameters())
    assert module.__dict__.keys() == attributes
    assert {value.dtype for value in state(module).values()} == {value.dtype for value in before.values()}
    assert not torch.equal(state(module)["0.weight"], before["0.weight"])


def test_half_precision_is_used_and_bounded_to_the_run() -> None:
    seen = []

    class Note(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return x

    module = nn.Sequential(nn.Linear(6, 2), Note())
    for mixed_precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        train(module, loader(), cross_entropy, Training(1, mixed_precision=mixed_precision))
        assert set(seen) == {dtype}
        assert module(torch.zeros(1, 6)).dtype == torch.float32
    with pytest.raises(UsageError, match="mixed_precision 'fp16' needs a GPU; give 'bf16' or 'no'"):
        train(module, loader(), cross_entropy, Training(1, mixed_precision="fp16"))


class Column(Hook):
    name = "column"

    def columns(self, module: nn.Module, moment: Moment) -> Mapping[str, float]:  # noqa: ARG002
        return {"squared_step": moment.step**2}


def test_the_log_says_what_the_history_says(tmp_path: Path) -> None:
    def measure(module: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {**classification(module, batch), "odd": torch.tensor(math.inf)}

    history = train(
        net(),
        loader(),
        cross_entropy,
        Training(3),
        validation=loader(),
        measure=measure,
        hooks=[Column()],
        folder=tmp_path,
    )
    log = json.loads((tmp_path / "log.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    rows = [record.row() for record in history.records]
    assert log == {
        "stopped_by": history.stopped_by,
        "best_epoch": history.best_epoch,
        "epochs": [{**row, "validation_odd": None} for row in rows],
    }
    table = list(csv.DictReader(io.StringIO((tmp_path / "log.csv").read_text())))
    assert [{name: float(value) for name, value in row.items()} for row in table] == rows
    assert [row["squared_step"] for row in rows] == [25, 100, 225]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_progress(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], progress: bool, shown: bool) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    train(net(), loader(), cross_entropy, Training(2), progress=progress)
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("epoch 2/2" in text and "10/10" in text and "loss=" in text) is shown
    assert (text == "") is not shown
