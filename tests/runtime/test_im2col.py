"""Patches as rows: equal to torch's own unfold, compiled or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fxprune.runtime import native
from fxprune.runtime.im2col import _im2col, im2col

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    st.integers(1, 2), st.integers(7, 12), st.integers(7, 12), st.sampled_from([1, 3, 4, 8]),
    PAIRS, PAIRS, st.tuples(st.integers(0, 2), st.integers(0, 2)), PAIRS, st.booleans(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_patches_are_those_of_torch(
    batch: int, height: int, width: int, channels: int, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], as_levels: bool,
) -> None:  # fmt: skip
    native.load()
    images = torch.randint(0, 256, (batch, height, width, channels)).float()
    sizes = (kernel, stride, padding, dilation)
    columns = functional.unfold(images.permute(0, 3, 1, 2), kernel, dilation, padding, stride)
    expected = columns.unflatten(1, (channels, -1)).permute(0, 3, 2, 1).flatten(2)
    given_images = images.to(torch.uint8) if as_levels else images
    got = im2col(given_images, *sizes, 0)
    assert torch.equal(got.flatten(1, 2).float(), expected)
    if as_levels:
        assert torch.equal(im2col(given_images, *sizes, 77), _im2col(given_images, *sizes, 77))


def test_the_operator_keeps_what_torch_asks_of_it() -> None:
    torch.library.opcheck(im2col, (torch.rand(1, 5, 6, 3), [3, 2], [2, 1], [1, 0], [1, 2], 0))


BAD = {
    "rank": ((5, 5, 3), 0, "expected images \\[batch, height, width, channels\\]"),
    "size": ((1, 2, 2, 3), 0, "does not fit"),
    "fill": ((1, 5, 5, 3), 9, "only levels are filled up"),
}


@pytest.mark.parametrize("compute", [im2col, _im2col])
@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_refused(case: str, compute: Callable[..., Tensor]) -> None:
    shape, fill, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        compute(torch.rand(shape), [3, 3], [1, 1], [0, 0], [1, 1], fill)
