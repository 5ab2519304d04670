"""How close outputs are, by definition, and outputs that cannot be compared."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxprune.errors import InputError
from fxprune.timing.agreement import agreement, tensors_of

NAN, INF = math.nan, math.inf


def test_equal_outputs_agree_wholly() -> None:
    outputs = [torch.randn(3, 4), torch.arange(3), torch.tensor([True, False]), torch.zeros(2)]
    found = agreement([y.clone() for y in outputs], outputs)
    assert (found.difference, found.cosine) == (0.0, 1.0)


def test_the_worst_output_decides_and_the_cosine_is_of_all_together() -> None:
    expected = [torch.tensor([10.0, 0.0]), torch.tensor([0.0, 0.1])]
    found = agreement([torch.tensor([10.0, 1.0]), torch.tensor([0.05, 0.1])], expected)
    assert found.difference == pytest.approx(0.5)
    y, y0 = torch.tensor([10.0, 1.0, 0.05, 0.1]), torch.tensor([10.0, 0.0, 0.0, 0.1])
    assert found.cosine == pytest.approx(torch.nn.functional.cosine_similarity(y, y0, dim=0).item())


def test_scale_shows_in_the_difference_alone() -> None:
    y = torch.randn(50)
    found = agreement([2 * y], [y])
    assert found.difference == pytest.approx(1)
    assert found.cosine == pytest.approx(1)
    assert agreement([-y], [y]).cosine == pytest.approx(-1)


def test_nothing_where_something_is_expected_is_far_off() -> None:
    found = agreement([torch.zeros(3)], [torch.ones(3)])
    assert (found.difference, found.cosine) == (1.0, 0.0)
    assert agreement([torch.ones(3)], [torch.zeros(3)]).difference == INF


def test_values_that_are_not_finite_agree_with_their_like() -> None:
    expected = torch.tensor([NAN, INF, -INF, 4.0])
    assert agreement([torch.tensor([NAN, INF, -INF, 5.0])], [expected]).difference == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([torch.zeros(2, 3)], "its outputs have shapes 2×3, those of the model 3, scalar"),
        ([], "its outputs have shapes none, those"),
        ([torch.zeros(3), torch.tensor(NAN)], "finite where those of the model are not"),
        ([torch.tensor([0.0, 0.0, -INF]), torch.tensor(1.0)], "finite where those of the model are not"),
    ],
)
def test_other_outputs_are_refused(found: list[Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        agreement(found, [torch.tensor([0.0, 0.0, INF if len(found) == 2 else 0.0]), torch.tensor(1.0)])


def test_outputs_of_every_make_are_found_in_their_order() -> None:
    y = torch.arange(3)
    found = tensors_of({"a": [y, None], "b": (y.numpy() + 1, 7, "text")})
    assert [tensor.tolist() for tensor in found] == [[0, 1, 2], [1, 2, 3]]
