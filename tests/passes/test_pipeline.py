from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch.fx.passes.infra.pass_manager import PassManager

from fxprune.errors import SpecError, VerifyError
from fxprune.graph.passes import Pass, PassEvent, Pipeline, parse_spec
from passes import PASSES, ChannelSelection, ChannelSurgery, MaskInsertion
from tests.passes.nets import Residual, traced


@given(
    macs=st.none() | st.floats(0.01, 1e12) | st.integers(1, 99).map(lambda n: f"{n}%"),
    scope=st.sampled_from(["global", "uniform"]),
    round_to=st.integers(1, 64),
    exclude=st.lists(st.from_regex(r"[a-z][a-z0-9_.*]{0,12}", fullmatch=True), max_size=3),
    allow_statistical=st.booleans(),
)
def test_a_pipeline_is_its_spec(
    macs: float | str | None, scope: str, round_to: int, exclude: list[str], allow_statistical: bool
) -> None:
    selection = ChannelSelection(
        macs=macs, scope=scope, round_to=round_to, exclude=tuple(exclude), allow_statistical=allow_statistical
    )
    pipeline = Pipeline((MaskInsertion(), selection, ChannelSurgery()))
    assert parse_spec(str(pipeline), PASSES) == pipeline.passes


@pytest.mark.parametrize("kind", PASSES, ids=lambda k: k.name)
def test_every_pass_spells_itself(kind: type[Pass]) -> None:
    assert parse_spec(kind.name, PASSES) == (kind(),)
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("winograd", r"unknown pass 'winograd'; known: "),
        ("mask-insertio", r"unknown pass 'mask-insertio'; did you mean 'mask-insertion'"),
        ("channel-selection{mac=50%}", r"has no option 'mac'; did you mean 'macs'"),
        ("channel-selection{macs}", r"has no option 'macs'|macs"),
        ("mask-insertion channel", r"cannot read the pass spec"),
        ("", r"the pass spec is empty"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(spec, PASSES)


def test_objects_have_no_spelling() -> None:
    with pytest.raises(SpecError, match="has no spelling"):
        str(ChannelSelection(criterion=lambda _: None))


@dataclasses.dataclass(frozen=True)
class Broken(Pass):
    name: ClassVar[str] = "broken"
    how: str = "raise"

    def rewrite(self, module: fx.GraphModule) -> bool:
        if self.how == "raise":
            raise RuntimeError("lost")
        if self.how == "dangle":
            module.register_buffer("forgotten", torch.zeros(1))
        else:
            (output,) = (n for n in module.graph.nodes if n.op == "output")
            output.args = (next(iter(module.graph.nodes)),)
        return True


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "pass 'broken' failed: RuntimeError: lost"),
        ("dangle", "pass 'broken' left 'forgotten' behind"),
        ("reshape", "pass 'broken' changed the shapes of the outputs"),
    ],
)
def test_a_broken_pass_is_named_and_its_input_untouched(how: str, message: str) -> None:
    module = traced(Residual())
    before = str(module.graph)
    with pytest.raises(VerifyError) as caught:
        Pipeline((Broken(how),))(module)
    assert message in str(caught.value)
    assert str(module.graph) == before


def test_observers_are_told() -> None:
    events: list[PassEvent] = []
    Pipeline((MaskInsertion(), ChannelSurgery()), (events.append,))(traced(Residual()))
    assert [e.name for e in events] == ["mask-insertion", "channel-surgery"]
    assert all(e.modified and e.seconds > 0 for e in events)
    assert "mask_channels" not in events[0].before
    assert "mask_channels" in events[1].before


def test_passes_run_in_the_pass_manager_of_torch() -> None:
    module = traced(Residual())
    result = PassManager([MaskInsertion(), ChannelSelection(ratio=0.25), ChannelSurgery()])(module)
    assert result.modified
    assert result.graph_module.stem.out_channels == 3
