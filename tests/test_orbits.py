"""What users read off orbits and costs."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError
from fxprune.importance import Evidence
from passes import ChannelSelection
from tests.laws import assert_laws
from tests.passes.nets import Concatenation, Residual, masked, traced


def test_orbits_name_their_members_producers_and_absorbers() -> None:
    orbits = fxprune.find_orbits(traced(Residual()))
    (orbit,) = orbits
    assert (orbit.name, orbit.width, orbit.channels, orbit.statistical) == ("orbit_0", 4, 1, None)
    assert orbit.producers == ("stem", "branch")
    assert orbit.absorbers == ("branch", "head")
    assert orbit.layers == ("stem", "depthwise", "branch")
    members = {(m.parameter, m.dimension): m.indices for m in orbit.members}
    assert members["head.weight", 1].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert members["branch.weight", 1].tolist() == [[0], [1], [2], [3]]
    assert orbits["orbit_0"] is orbit
    with pytest.raises(KeyError, match="there are 1: orbit_0"):
        orbits["orbit_7"]


def test_pinned_names_node_operator_and_reason() -> None:
    pinned = fxprune.find_orbits(traced(Residual())).pinned
    (head,) = (p for p in pinned if (p.parameter, p.dimension) == ("head.weight", 0))
    assert str(head.reason) == "returned by the model (output at output)"
    assert head.indices.tolist() == [0, 1, 2]


def test_orbits_as_a_networkx_graph() -> None:
    graph = fxprune.find_orbits(traced(Concatenation())).to_networkx()
    assert graph.nodes["orbit_0"]["width"] == 2
    assert "a.weight" in graph.nodes["orbit_0"]["members"]
    assert set(graph.predecessors("orbit_0")) == {"a", "c"}
    assert set(graph.successors("orbit_0")) == {"left"}
    assert set(graph.successors("orbit_2")) == {"right"}


def test_expected_cost_is_differentiable_and_exact_at_zeros_and_ones() -> None:
    module = masked(Residual(), orbit_0=[1, 0, 1, 1])
    orbits = fxprune.find_orbits(module)
    model = fxprune.CostModel(module, orbits)
    keep = model.all_kept()
    keep[orbits["orbit_0"].classes[1]] = 0
    assert model.cost(keep).macs == round(float(model.macs(keep)))
    half = keep.clone().fill_(0.5).requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.macs(half), half)
    step = 1e-6
    for i in orbits["orbit_0"].classes.tolist():
        moved = half.detach().clone()
        moved[i] += step
        assert float((model.macs(moved) - model.macs(half.detach())) / step) == pytest.approx(
            float(gradient[i]), rel=1e-4
        )
    assert torch.autograd.grad(model.parameters(half), half)[0].count_nonzero() > 0


class Gathering(nn.Module):
    """Takes whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 2, 1)

    def forward(self, first: Tensor, /, *more: Tensor, scale: float = 1.0, **named: Any) -> Tensor:
        y = self.a(first)
        for x in (*more, *named.values()):
            y = y + self.a(x)
        return self.b(y * scale)


def test_variadic_inputs() -> None:
    x = [torch.randn(1, 3, 4, 4) for _ in range(4)]
    model = Gathering().eval()
    inputs = fxprune.Inputs((x[0], x[1], x[2]), {"extra": x[3], "scale": 2.0})
    module = fxprune.trace(model, inputs)
    assert torch.equal(module(*x), model(*x[:3], extra=x[3], scale=2.0))
    assert fxprune.prune(model, inputs, macs="50%").module(*x).shape == (1, 2, 4, 4)


@pytest.mark.parametrize("model", [Residual, Concatenation])
def test_the_export_front_end_obeys_the_laws(model: type[nn.Module]) -> None:
    assert_laws(model(), torch.randn(2, 3, 4, 4), frontend="export", removed_at_least=0.1)


def test_taylor_refuses_what_it_cannot_rank_by() -> None:
    for batches, message in (([], "no batch was given"), ([float("nan")], "the loss of batch 0 is nan")):
        evidence = Evidence(batches, lambda m, scale: m(torch.ones(1, 3, 4, 4)).sum() * scale)
        with pytest.raises(InputError, match=message):
            ChannelSelection(ratio=0.5, criterion="taylor", evidence=evidence)(masked(Residual()))


def test_changes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    fxprune.prune(Residual().eval(), torch.zeros(2, 3, 4, 4), macs="50%", observers=[fxprune.print_changes])
    printed = capsys.readouterr().out
    assert "--- mask-insertion" in printed
    assert "+%channel_masks_orbit_0 = get channel_masks.orbit_0 : keeps" in printed
    assert "-%stem = stem Conv2d(3→4)(%x)" in printed


def test_an_analysis_keeps_nothing_alive() -> None:
    module = masked(Residual())
    fxprune.find_orbits(module)
    result = fxprune.prune(Residual().eval(), torch.zeros(2, 3, 4, 4), macs="50%")
    alive = [weakref.ref(module), weakref.ref(result.module), weakref.ref(result.traced)]
    del module, result
    gc.collect()
    assert [ref() for ref in alive] == [None, None, None]


def test_a_graph_without_shapes_is_refused() -> None:
    with pytest.raises(InputError, match=r"make it with fxprune\.trace"):
        fxprune.find_orbits(torch.fx.symbolic_trace(Residual()))


def view(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Not torch's, which surgery knows how to change."""
    return x.reshape(size)


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Linear(8 * 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.reshape(self.a(x), (-1, 8 * 16)))


def test_a_function_that_only_shares_its_name_with_one_of_torch_pins() -> None:
    module = torch.fx.symbolic_trace(Foreign().eval())
    image, _, called, *_ = module.graph.nodes
    image.meta["val"] = torch.empty(1, 3, 4, 4, device="meta")
    called.target = view
    orbits = fxprune.find_orbits(module)
    assert len(orbits) == 0
    assert {p.reason.node for p in orbits.pinned if p.parameter == "a.weight" and p.dimension == 0} == {"reshape"}


class ByOthersShape(nn.Module):
    """Takes sizes from a tensor whose channels leave independently."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(3, 8, 1)
        self.gate = nn.Conv2d(3, 1, 1)
        self.head = nn.Conv2d(8, 2, 1)
        self.other = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        gated = a * self.gate(x).expand_as(b)
        return self.head(gated.view_as(a)) + self.other(b.flatten(2).view_as(b))


def test_sizes_of_another_tensor_leave_the_batch_open() -> None:
    cut = assert_laws(ByOthersShape(), torch.randn(2, 3, 4, 4))
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    assert torch.allclose(cut.slim(x), cut.masked(x), atol=1e-12)


def test_a_loss_without_gradient_is_refused() -> None:
    evidence = Evidence([torch.ones(1, 3, 4, 4)], lambda m, x: m(x).detach().sum())
    with pytest.raises(InputError, match="the loss has no gradient"):
        ChannelSelection(ratio=0.5, criterion="taylor", evidence=evidence)(masked(Residual()))


def test_the_record_says_that_ratios_were_given_by_layer() -> None:
    result = fxprune.prune(Residual().eval(), torch.zeros(2, 3, 4, 4), ratio={"stem": 0.5})
    assert "channel-selection{ratio=by-layer}" in result.plan.spec
