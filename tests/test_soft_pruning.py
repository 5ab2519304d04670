"""Soft pruning by itself: values, gradients against the paper's closed forms, limits, and what a stall looks like."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune.runtime.thresholds import LearnedThreshold, SoftPruning, hard_pruning, temperature_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _sigma(w: float, threshold: float, temperature: float) -> float:
    """Eq. 4, word for word."""
    s = _sigmoid((w * w - threshold) / temperature)
    return 2 * w / temperature * s * (1 - s)


def _slope_of_norm(w: float, threshold: float, temperature: float) -> float:
    """The summand of ∂L0/∂τ, −½ σ_T(w)/w; its limit where w is 0."""
    if w != 0:
        return -_sigma(w, threshold, temperature) / w / 2
    s = _sigmoid(-threshold / temperature)
    return -s * (1 - s) / temperature


weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 2), st.floats(-2, -1e-3)), min_size=1, max_size=20)
thresholds = st.one_of(st.just(0.0), st.floats(0, 2))
temperatures = st.floats(1e-2, 10)


@pytest.mark.parametrize("exact", [False, True])
@given(values=weights, threshold=thresholds, temperature=temperatures, seed=st.integers(0, 99))
@settings(deadline=None)
def test_values_and_gradients_are_the_closed_forms(
    exact: bool, values: list[float], threshold: float, temperature: float, seed: int
) -> None:
    w = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    tau, upstream = _scalar(threshold), torch.randn(len(values), generator=torch.Generator().manual_seed(seed)).double()
    v, norm = SoftPruning.apply(w, tau, _scalar(temperature).detach(), exact)
    penalty = 0.7
    (v @ upstream + penalty * norm).backward()

    kept = [_sigmoid((x * x - threshold) / temperature) for x in values]
    sigma = [_sigma(x, threshold, temperature) for x in values]
    slopes = [_slope_of_norm(x, threshold, temperature) for x in values]
    g = upstream.tolist()
    by_tau = sum(-a * b / 2 for a, b in zip(g, sigma, strict=True)) + penalty * sum(slopes)  # Eq. 3, 7, 10, 11
    by_w = [a * s for a, s in zip(g, kept, strict=True)]  # Eq. 13
    if exact:
        by_w = [b + (x * a + penalty) * o for b, x, a, o in zip(by_w, values, g, sigma, strict=True)]  # Eq. 12
    torch.testing.assert_close(v.tolist(), [x * s for x, s in zip(values, kept, strict=True)])
    assert float(norm.detach()) == pytest.approx(sum(kept))
    assert w.grad is not None
    assert tau.grad is not None
    torch.testing.assert_close(w.grad.tolist(), by_w, rtol=1e-9, atol=1e-12)
    assert float(tau.grad) == pytest.approx(by_tau, rel=1e-9, abs=1e-12)


@given(values=weights, threshold=thresholds, temperature=temperatures)
@settings(max_examples=25, deadline=None)
def test_the_exact_gradient_is_that_of_finite_differences(
    values: list[float], threshold: float, temperature: float
) -> None:
    w = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    fixed = torch.tensor(temperature, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x, t: SoftPruning.apply(x, t, fixed, True), (w, _scalar(threshold)), atol=1e-4)


@given(values=weights, threshold=thresholds, temperature=temperatures)
@settings(max_examples=25, deadline=None)
def test_the_threshold_has_its_true_gradient_in_either_mode(
    values: list[float], threshold: float, temperature: float
) -> None:
    w = torch.tensor(values, dtype=torch.float64)
    fixed = torch.tensor(temperature, dtype=torch.float64)
    torch.autograd.gradcheck(lambda t: SoftPruning.apply(w, t, fixed, False), (_scalar(threshold),), atol=1e-4)


def test_the_norm_alone_leaves_the_weights_alone_unless_exact() -> None:
    for exact in (False, True):
        w = torch.tensor([0.3, -0.5], requires_grad=True)
        SoftPruning.apply(w, torch.tensor(0.2), torch.tensor(0.1), exact)[1].backward()
        assert w.grad is not None
        assert bool(w.grad.any()) is exact


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype_is_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    w = torch.tensor([0.0, 1e-4, -3e-4, 2e-3, -0.5, 200.0], dtype=dtype, requires_grad=True)
    tau = torch.tensor(4e-8, requires_grad=True)
    temperature = torch.tensor(2e-8)
    v, norm = SoftPruning.apply(w, tau, temperature, False)
    (v.sum().float() + norm).backward()
    assert v.dtype == dtype
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    assert w.grad is not None
    assert tau.grad is not None
    kept = torch.sigmoid((w.detach().double() ** 2 - 4e-8) / 2e-8)
    torch.testing.assert_close(
        v.double(), w.detach().double() * kept, rtol=1e-2 if dtype.itemsize < 4 else 1e-6, atol=0
    )
    assert float(norm.detach()) == pytest.approx(float(kept.sum()), rel=1e-5)
    by_tau = -((w.detach().double() + 1) * kept * (1 - kept) / 2e-8).sum()
    assert float(tau.grad) == pytest.approx(float(by_tau), rel=1e-2 if dtype.itemsize < 4 else 1e-5)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("temperature", [1e-38, 1e-30, 1e-3, 1e30])
def test_gradients_are_finite_however_far_from_the_threshold(exact: bool, temperature: float) -> None:
    w = torch.tensor([0.0, 1e-30, -1e-15, 1.0, -1e19, 1e30], requires_grad=True)
    tau = torch.tensor(1e-3, requires_grad=True)
    v, norm = SoftPruning.apply(w, tau, torch.tensor(temperature), exact)
    (v.mul(1e-3).sum() + norm).backward()
    assert w.grad is not None
    assert tau.grad is not None
    for result in (v, norm, w.grad, tau.grad):
        assert bool(torch.isfinite(result).all())


def test_a_low_temperature_is_hard_pruning() -> None:
    w = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.0])
    prune = LearnedThreshold(w)
    prune.threshold.data.fill_(0.05)
    gaps = []
    for temperature in (1e-1, 1e-2, 1e-3, 1e-4):
        prune.temperature.fill_(temperature)
        gaps.append(float((prune(w) - prune.harden(w)).detach().abs().max()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-20
    assert prune.hard_mask(w).tolist() == [False, False, True, True, False]
    assert float(prune.soft_norm(w).detach()) == pytest.approx(2)


def test_hard_pruning_keeps_only_what_is_strictly_above_and_never_a_zero() -> None:
    w = torch.tensor([0.5, -0.5, 0.0, -0.0, 0.25, 1e-30])
    prune = LearnedThreshold(w)
    assert prune.hard_mask(w).tolist() == [True, True, False, False, True, False]  # (1e-30)² is 0 in float32
    prune.threshold.data.fill_(0.25)
    assert prune.hard_mask(w).tolist() == [False] * 6
    assert torch.equal(prune.hard_mask(w), prune.harden(w) != 0)


@pytest.mark.parametrize(
    ("values", "spread"),
    [
        ([1.0, -3.0, 1.0, 3.0], 1.0),  # σ² of the magnitudes, whatever the signs
        ([0.5, -0.5, 0.5], 0.25),  # one magnitude: their square
        ([3.0], 9.0),
        ([0.0, 0.0], 1.0),
        ([0.1, 0.1 + 1e-8], 0.01),  # a spread that is rounding
    ],
)
def test_the_temperature_follows_the_spread_of_the_weights(values: list[float], spread: float) -> None:
    assert float(temperature_of(torch.tensor(values), 1e-3)) == pytest.approx(1e-3 * spread, rel=1e-5)


@pytest.mark.parametrize("values", [[0.5, -0.5, 0.5], [3.0], [0.0, 0.0], [1e-4, 1e-4]], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_degenerate_tensors_train(values: list[float], dtype: torch.dtype) -> None:
    w = torch.tensor(values, dtype=dtype, requires_grad=True)
    prune = LearnedThreshold(w)
    assert prune.threshold.dtype == torch.promote_types(dtype, torch.float32)
    (prune(w).float().sum() + prune.soft_norm(w)).backward()
    assert w.grad is not None
    assert prune.threshold.grad is not None
    assert bool(torch.isfinite(w.grad).all())
    assert bool(torch.isfinite(prune.threshold.grad))


def test_a_threshold_at_zero_barely_changes_the_weights() -> None:
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert float((LearnedThreshold(w)(w) - w).detach().abs().max()) < 0.01


def test_half_precision_models_keep_exact_thresholds() -> None:
    layer = nn.Linear(8, 8)
    nn.utils.parametrize.register_parametrization(layer, "weight", LearnedThreshold(layer.weight))
    prune = layer.parametrizations.weight[0]
    before = prune.temperature.clone()
    layer.half()
    assert layer.parametrizations.weight.original.dtype == torch.float16
    assert (prune.threshold.dtype, prune.temperature.dtype) == (torch.float32, torch.float32)
    assert torch.equal(prune.temperature, before)
    assert layer.weight.dtype == torch.float16
    layer.double()
    assert prune.threshold.dtype == torch.float64


def test_hard_pruning_ends_with_its_block_even_when_that_fails() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        nn.utils.parametrize.register_parametrization(layer, "weight", LearnedThreshold(layer.weight))
        layer.parametrizations.weight[0].threshold.data.fill_(0.05)
    soft, raw = model[0].weight, model[0].parametrizations.weight.original

    def fail_inside() -> None:
        with hard_pruning(model):
            assert torch.equal(model[0].weight, raw * (raw * raw > 0.05))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(model[0].weight, soft)


def test_a_threshold_in_use_can_be_copied() -> None:
    layer = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", LearnedThreshold(layer.weight))
    layer(torch.ones(1, 4)).sum().backward()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight, layer.weight)


def _settle(exact: bool) -> tuple[LearnedThreshold, Tensor]:
    """Prune 2,000 weights, each of which costs ½(v − best)², with the same settings but for the gradient."""
    best = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = best.clone().requires_grad_(True)
    prune = LearnedThreshold(w, exact=exact)
    optimizer = torch.optim.SGD([{"params": [w]}, {"params": [prune.threshold], "lr": 1e-6}], lr=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        loss = (prune(w) - best).square().sum() / 2 + 0.1 * prune.soft_norm(w)
        loss.backward()
        optimizer.step()
    return prune, w.detach()


def test_the_exact_gradient_stalls_at_a_gap_around_the_threshold() -> None:
    """Figure 1, right: equation 3 for the weights clears the surroundings of the threshold, which then stays low."""
    (prune, w), (stalled, pushed) = _settle(exact=False), _settle(exact=True)

    def in_transition(threshold: LearnedThreshold, values: Tensor) -> int:
        return int(((values.square() - threshold.threshold) / threshold.temperature).abs().lt(5).sum())

    assert in_transition(stalled, pushed) == 0
    assert in_transition(prune, w) > 10
    assert stalled.threshold < prune.threshold / 5
    removed, removed_when_stalled = ((~t.hard_mask(x)).double().mean() for t, x in ((prune, w), (stalled, pushed)))
    assert removed > 2 * removed_when_stalled
    assert removed > 0.3
