from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import UsageError
from passes import MaskInsertion
from tests.laws import assert_laws
from tests.passes.nets import Concatenation, Residual, masked, traced


def test_golden(golden: Callable[[str, str], None]) -> None:
    for model in (Residual(), Concatenation()):
        golden(f"mask_insertion_{type(model).__name__.lower()}", fxprune.diff(traced(model), masked(model)))


def test_a_masked_graph_is_left_alone() -> None:
    assert not MaskInsertion()(masked(Residual())).modified


def test_masks_are_state_of_the_module() -> None:
    module = masked(Residual(), orbit_0=[1, 0, 1, 1])
    assert module.state_dict()["channel_masks.orbit_0"].tolist() == [1, 0, 1, 1]
    assert module.half().get_buffer("channel_masks.orbit_0").dtype is torch.float16


def test_a_mask_zeroes_its_channel_before_the_absorber() -> None:
    module = masked(Residual(), orbit_0=[0, 1, 1, 1])
    x = torch.randn(2, 3, 4, 4)
    before = module(x)
    with torch.no_grad():
        module.get_submodule("branch").weight[:, 0] = 100.0
    assert torch.equal(module(x), before)


def test_a_model_with_a_submodule_named_masks_is_pruned() -> None:
    model = nn.Sequential()
    model.add_module("masks", nn.Conv2d(3, 8, 1))
    model.add_module("head", nn.Conv2d(8, 2, 1))
    assert assert_laws(model, torch.randn(2, 3, 4, 4)).width("masks.weight", 0) < 8


def test_a_taken_name_is_refused() -> None:
    graph = traced(Residual())
    graph.channel_masks = nn.Identity()
    with pytest.raises(UsageError, match=r"'channel_masks'.*rename it"):
        MaskInsertion()(graph)
