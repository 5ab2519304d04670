from __future__ import annotations

from collections.abc import Callable

import torch

import fxprune
from passes import MaskInsertion
from tests.passes.nets import Concatenation, Residual, masked, traced


def test_golden(golden: Callable[[str, str], None]) -> None:
    for model in (Residual(), Concatenation()):
        golden(f"mask_insertion_{type(model).__name__.lower()}", fxprune.diff(traced(model), masked(model)))


def test_a_masked_graph_is_left_alone() -> None:
    assert not MaskInsertion()(masked(Residual())).modified


def test_masks_are_state_of_the_module() -> None:
    module = masked(Residual(), orbit_0=[1, 0, 1, 1])
    assert module.state_dict()["masks.orbit_0"].tolist() == [1, 0, 1, 1]
    assert module.half().get_buffer("masks.orbit_0").dtype is torch.float16


def test_a_mask_zeroes_its_channel_before_the_absorber() -> None:
    module = masked(Residual(), orbit_0=[0, 1, 1, 1])
    x = torch.randn(2, 3, 4, 4)
    before = module(x)
    with torch.no_grad():
        module.get_submodule("branch").weight[:, 0] = 100.0
    assert torch.equal(module(x), before)
