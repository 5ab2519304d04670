from __future__ import annotations

from collections.abc import Callable

import pytest

import fxprune
from fxprune.errors import PlanError
from fxprune.graph.passes import Pipeline
from passes import ChannelSurgery
from tests.passes.nets import Concatenation, Residual, masked, traced


def test_golden_residual(golden: Callable[[str, str], None]) -> None:
    module = masked(Residual(), orbit_0=[1, 0, 1, 1])
    slim = Pipeline((ChannelSurgery(),))(module).graph_module
    golden("channel_surgery_residual", fxprune.diff(module, slim))


def test_golden_concatenation(golden: Callable[[str, str], None]) -> None:
    module = masked(Concatenation(), orbit_0=[1, 0], orbit_2=[1, 0, 1])
    slim = Pipeline((ChannelSurgery(),))(module).graph_module
    golden("channel_surgery_concatenation", fxprune.diff(module, slim))


def test_masks_of_ones_only_go_away() -> None:
    slim = Pipeline((ChannelSurgery(),))(masked(Residual())).graph_module
    assert fxprune.dump(slim) == fxprune.dump(traced(Residual()))


def test_an_orbit_without_channels_is_refused() -> None:
    module = masked(Residual(), orbit_0=[0, 0, 0, 0])
    with pytest.raises(PlanError, match="removes all 4 channels of stem"):
        Pipeline((ChannelSurgery(),))(module)
