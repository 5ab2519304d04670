from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxprune.sparsity.ranking import Ranked, take_least

SCORES = st.sampled_from([0.0, -0.0, 1e-42, 1e-8, 0.25, 0.5, 0.5000001, 1.0, 3.0, 1e30])
BLOCKS = st.lists(st.tuples(SCORES, st.integers(1, 4)), min_size=1, max_size=12)


def _ranked(blocks: list[tuple[float, int]], limit: float = 1.0, *, equal: bool = False) -> Ranked:
    scores = torch.tensor([score for score, _ in blocks]).abs()
    costs = torch.tensor([float(cost) for _, cost in blocks], dtype=torch.float64)
    total = len(blocks) * 2.0 if equal else float(costs.sum())
    return Ranked(lambda: scores, 2.0 if equal else costs, total, limit * total)


def _by_sorting(layers: list[Ranked], amount: float) -> set[tuple[int, int]]:
    """Return what leaves, by the definition: in order of score, layer and position, until the amount is reached."""
    blocks = []
    for layer, ranked in enumerate(layers):
        scores = ranked.scores().tolist()
        costs = ranked.costs.tolist() if isinstance(ranked.costs, Tensor) else [ranked.costs] * len(scores)
        blocks += [(score, layer, i, cost) for i, (score, cost) in enumerate(zip(scores, costs, strict=True))]
    taken, spent = set(), 0.0
    for _, layer, i, cost in sorted(blocks):
        if spent >= amount:
            break
        taken.add((layer, i))
        spent += cost
    return taken


def _pairs(taken: list[Tensor]) -> set[tuple[int, int]]:
    return {(layer, i) for layer, mask in enumerate(taken) for i in mask.nonzero().flatten().tolist()}


@given(st.lists(BLOCKS, min_size=1, max_size=4), st.floats(0, 1), st.booleans())
def test_the_least_blocks_of_all_layers_leave(blocks: list[list[tuple[float, int]]], share: float, equal: bool) -> None:
    layers = [_ranked(one, equal=equal) for one in blocks]
    amount = int(share * sum(layer.total for layer in layers))
    assert _pairs(take_least(layers, amount)) == _by_sorting(layers, amount)


@given(st.lists(BLOCKS, min_size=1, max_size=4), st.floats(0.1, 1), st.floats(0, 1))
def test_no_layer_loses_more_than_its_limit(blocks: list[list[tuple[float, int]]], limit: float, share: float) -> None:
    layers = [_ranked(one, limit) for one in blocks]
    for layer, taken in zip(layers, take_least(layers, share * sum(x.total for x in layers)), strict=True):
        assert isinstance(layer.costs, Tensor)
        assert float(layer.costs[taken].sum()) <= layer.limit * (1 + 1e-6)


def test_a_limit_lets_other_layers_lose_instead() -> None:
    small, large = _ranked([(0.1, 1)] * 4, 0.5), _ranked([(0.9, 1)] * 4)
    assert [int(taken.sum()) for taken in take_least([small, large], 4)] == [2, 2]


def test_equal_scores_leave_by_layer_and_position() -> None:
    layers = [_ranked([(0.5, 1)] * 3), _ranked([(0.5, 1)] * 3)]
    assert [taken.tolist() for taken in take_least(layers, 4)] == [[True] * 3, [True, False, False]]


def test_nothing_is_taken_of_nothing() -> None:
    assert take_least([], 1.0) == []
    assert not take_least([_ranked([(0.0, 1), (1.0, 1)])], 0.0)[0].any()
