"""Measures on validation data: what they are, that they leave no trace, and what follows from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.errors import SpecError
from fxprune.training import Hook, Training, classification, cross_entropy, train
from tests.training.tasks import (
    Watch,
    assert_same_state,
    by_epoch,
    exact_loader,
    loader,
    net,
    state,
)


@pytest.mark.parametrize("hooks", [[], [Watch(measuring=True)]], ids=["validating", "measuring"])
def test_measuring_leaves_no_trace(hooks: list[Hook]) -> None:
    options = Training(2, tolerance=None, keep_best=False)
    alone, measured = net(), net()
    train(alone, loader(), cross_entropy, options)
    train(measured, loader(), cross_entropy, options, validation=loader(12, 5), measure=classification, hooks=hooks)
    assert_same_state(state(alone), state(measured))


@pytest.mark.parametrize(
    ("losses", "smoothing", "tolerance", "epochs"),
    [
        ([1.0, 0.9, 0.8, 0.7], 0.0, 1e-4, None),
        ([1.0, 0.99989, 0.9, 0.8], 0.0, 1e-4, None),
        ([1.0, 0.99991, 0.9, 0.8], 0.0, 1e-4, 2),
        ([1.0, 0.9, 1.1, 0.8], 0.0, 1e-4, 3),
        ([1.0, 0.9, 1.1, 0.8], 0.0, None, None),
        ([1.0, 0.5, 0.6, 0.5], 0.9, 1e-4, None),  # smoothed: 1, 0.95, 0.915, 0.8735
        ([1.0, 0.5, 0.96, 0.5], 0.9, 1e-4, 3),  # smoothed: 1, 0.95, 0.951
        ([2.0, 2.0, 1.0, 1.0], 0.0, 0.0, 2),
        ([-1.0, -1.1, -1.10001, -2.0], 0.0, 1e-4, 3),
    ],
)
def test_the_stop_rule(losses: list[float], smoothing: float, tolerance: float | None, epochs: int | None) -> None:
    script, measure = by_epoch(losses)
    options = Training(4, tolerance=tolerance, smoothing=smoothing)
    history = train(net(), loader(16), cross_entropy, options, validation=loader(4), measure=measure, hooks=[script])
    assert len(history.records) == (epochs or 4)
    assert history.stopped_by == ("epochs" if epochs is None else "tolerance")
    smoothed = [losses[0]]
    for loss in losses[1 : len(history.records)]:
        smoothed.append(smoothing * smoothed[-1] + (1 - smoothing) * loss)
    assert [record.smoothed_loss for record in history.records] == pytest.approx(smoothed)


@pytest.mark.parametrize(("keep_best", "kept"), [(True, 2), (False, 4)])
def test_the_best_weights_are_kept(keep_best: bool, kept: int) -> None:
    script, measure = by_epoch([1.0, 0.2, 0.5, 0.2])
    module, watch = net(), Watch()
    options = Training(4, tolerance=None, keep_best=keep_best)
    history = train(
        module, loader(), cross_entropy, options, validation=loader(4), measure=measure, hooks=[script, watch]
    )
    assert history.best_epoch == 2
    assert_same_state(state(module), watch.states[kept - 1])
    assert not torch.equal(watch.states[1]["0.weight"], watch.states[3]["0.weight"])


@pytest.mark.parametrize("batch_size", [1, 4, 7, 30])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_sample_weighs_the_same(batch_size: int, shuffle: bool) -> None:
    module = net()
    data = exact_loader(21, batch_size, shuffle)
    history = train(module, loader(), cross_entropy, Training(1), validation=data, measure=classification)
    default = train(net(), loader(), cross_entropy, Training(1), validation=data)
    with torch.no_grad():
        points, labels = (torch.stack(column) for column in zip(*data.dataset, strict=True))
        logits = module.eval()(points)
    loss = functional.cross_entropy(logits, labels).item()
    hits = (logits.argmax(1) == labels).double().mean().item()
    assert history.records[0].measures == pytest.approx({"loss": loss, "accuracy": hits}, rel=1e-5)
    assert default.records[0].measures == pytest.approx({"loss": loss}, rel=1e-5)


def test_batches_without_tensors_weigh_the_same() -> None:
    def measure(module: nn.Module, batch: float) -> dict[str, Tensor]:  # noqa: ARG001
        return {"loss": torch.tensor(batch)}

    history = train(net(), loader(), cross_entropy, Training(1), validation=[1.0, 2.0, 6.0], measure=measure)
    assert history.records[0].measures == {"loss": 3.0}


def _as_number(module: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    return {"loss": float(cross_entropy(module, batch))}


@pytest.mark.parametrize(
    ("measure", "message"),
    [(cross_entropy, "measure returned Tensor"), (_as_number, "measure returned a float as 'loss'; return a tensor")],
)
def test_a_wrong_measure_fails_before_the_first_step(measure: Any, message: str) -> None:
    watch = Watch()
    with pytest.raises(SpecError, match=message):
        train(net(), loader(), cross_entropy, Training(1), validation=loader(), measure=measure, hooks=[watch])
    assert watch.moments == []
