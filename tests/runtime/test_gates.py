"""Gates by themselves: what they sample, what they predict, what they are in evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune.runtime.gates import PredictedGate, TrainedGate, window_means

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def predictor(channels: int, spatial: int, dim: int = 1, **options: object) -> PredictedGate:
    """Return a gate whose predictor has random weights."""
    gate = PredictedGate(channels, channels, spatial, dim, dtype=torch.float64, **options)  # type: ignore[arg-type]
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    return gate


def as_convolutions(gate: PredictedGate, features: Tensor) -> Tensor:
    """Predict as the paper says: depthwise 3×3, then 1×1, then the mean over batch and space."""
    kind, channels = CONVOLUTIONS[gate.spatial], len(gate.depthwise)
    depthwise = kind(channels, channels, 3, padding=1, groups=channels).double()
    pointwise = kind(channels, gate.units, 1).double()
    with torch.no_grad():
        depthwise.weight.copy_(gate.depthwise.view_as(depthwise.weight))
        depthwise.bias.copy_(gate.depthwise_bias)
        pointwise.weight.copy_(gate.pointwise.view_as(pointwise.weight))
        pointwise.bias.copy_(gate.pointwise_bias)
        return pointwise(depthwise(features)).flatten(2).mean((0, 2))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 99))
def test_predictors_are_the_convolutions_of_the_paper(space: list[int], batch: int, channels: int, seed: int) -> None:
    torch.manual_seed(seed)
    features = torch.randn(batch, channels, *space, dtype=torch.float64)
    gate = predictor(channels, len(space), block=2, momentum=0.0)
    gate.look(features)
    torch.testing.assert_close(gate.average, as_convolutions(gate, features))


def test_tokens_and_vectors_have_windows_too() -> None:
    tokens = torch.randn(2, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(window_means(tokens, 2, 1), window_means(tokens.mT, 1, 1))
    vectors = torch.randn(4, 5)
    torch.testing.assert_close(window_means(vectors, 1, 0), vectors.mean(0).unsqueeze(1))
    assert window_means(vectors.bfloat16(), 1, 0).dtype is torch.float32


def test_only_the_positions_of_the_orbit_are_seen() -> None:
    features = torch.randn(2, 6, 4, 4)
    index = torch.tensor([4, 1])
    gate = PredictedGate(2, 2, 2, 1, index)
    gate.look(features)
    torch.testing.assert_close(gate.windows, window_means(features, 1, 2)[index])


def test_the_average_moves_by_the_momentum() -> None:
    gate = predictor(3, 2, momentum=0.75)
    before = gate.average.clone()
    gate(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    torch.testing.assert_close(gate.average, 0.75 * before + 0.25 * gate.predicted().detach())
    moved = gate.average.clone()
    gate.eval()(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert torch.equal(gate.average, moved)


def test_every_gate_begins_at_its_initial_logit() -> None:
    gate = PredictedGate(8, 8, 2, 1, initial=3.0)
    gate(100 * torch.randn(2, 8, 4, 4))
    assert gate.logits().tolist() == [3.0] * 8
    assert gate.probabilities().tolist() == pytest.approx([1 / (1 + math.exp(-3))] * 8)


@pytest.mark.parametrize("kind", ["trained", "predicted"])
def test_gradients_reach_what_every_logit_is_made_of(kind: str) -> None:
    torch.manual_seed(0)
    weights = torch.arange(1.0, 8.0)
    if kind == "trained":
        trained = TrainedGate(7, block=3)
        (trained() * weights).sum().backward()
        assert trained.logit.grad is not None
        assert (trained.logit.grad != 0).all()
        return
    predicted = PredictedGate(7, 7, 2, 1, block=3)
    (predicted(torch.randn(2, 7, 4, 4)) * weights).sum().backward()
    for part, shape in ((predicted.pointwise_bias, (3,)), (predicted.pointwise, (3, 7))):
        assert part.grad is not None
        assert part.grad.shape == shape
        assert (part.grad != 0).all()


def test_features_get_no_gradient() -> None:
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    predictor_gate = PredictedGate(4, 4, 2, 1)
    predictor_gate(features).sum().backward()
    assert features.grad is None


def test_the_gradient_is_that_of_the_last_term_of_the_average() -> None:
    gate = predictor(3, 1, momentum=0.9)
    gate.look(torch.randn(2, 3, 5, dtype=torch.float64))
    gate.logits().sum().backward()
    assert gate.pointwise_bias.grad is not None
    torch.testing.assert_close(gate.pointwise_bias.grad, torch.full((3,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_a_channel_is_open_as_often_as_its_probability_says(logit: float) -> None:
    """A sample is above one half exactly when the noise leaves the logit positive."""
    torch.manual_seed(0)
    samples = TrainedGate(20_000, initial=logit)()
    share = float((samples > 0.5).float().mean())
    assert share == pytest.approx(1 / (1 + math.exp(-logit)), abs=0.015)
    assert ((samples >= 0) & (samples <= 1)).all()


def test_a_gate_of_probability_one_changes_nothing() -> None:
    for initial in (math.inf, 1000.0):
        gate = TrainedGate(50, initial=initial)
        assert torch.equal(gate(), torch.ones(50))
    assert torch.equal(TrainedGate(50, initial=-1000.0)(), torch.zeros(50))


def test_low_temperatures_leave_little_between_zero_and_one() -> None:
    torch.manual_seed(0)
    between = [
        float(((values > 0.05) & (values < 0.95)).float().mean())
        for values in (TrainedGate(5000, initial=0.0, temperature=t)() for t in (1.0, 0.1))
    ]
    assert between[1] < between[0] / 3


def test_evaluation_is_a_mask_that_keeps_at_least_the_best_block() -> None:
    gate = TrainedGate(5, block=2).eval()
    gate.logit.data = torch.tensor([-3.0, -1.0, -2.0])
    assert gate().tolist() == [0, 0, 1, 1, 0]
    gate.logit.data = torch.tensor([2.0, -1.0, 0.5])
    assert gate().tolist() == [1, 1, 0, 0, 1]
    assert "5, blocks of 2, keeps 3" in repr(gate)
    gate.logit.data = torch.full((3,), -1.0)
    assert gate().tolist() == [1, 1, 0, 0, 0]
    gate.logit.data = torch.full((3,), math.nan)
    assert gate().any()


def test_channels_of_a_block_share_their_sample() -> None:
    values = TrainedGate(64, block=32, initial=0.0)()
    assert values.unique().numel() == 2


def test_a_gate_may_be_asked_twice_in_one_step() -> None:
    gate = PredictedGate(4, 4, 2, 1)
    total = gate(torch.randn(2, 4, 3, 3)).sum() + gate(torch.randn(2, 4, 5, 5)).sum()
    total.backward()
    assert gate.pointwise_bias.grad is not None


def test_averages_stay_wide_under_autocast() -> None:
    gate = PredictedGate(4, 4, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        values = gate(torch.randn(2, 4, 3, 3).bfloat16())
    assert values.dtype is torch.float32
    assert gate.logits().dtype is torch.float32
