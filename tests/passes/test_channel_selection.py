from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import fxprune
from fxprune.cost import CostModel
from fxprune.errors import TargetError, UsageError
from fxprune.graph.passes import Pipeline
from fxprune.importance import CRITERIA, Evidence
from fxprune.labels.detection import find_orbits
from fxprune.narrowing.kept import kept_classes
from passes import ChannelSelection, MaskInsertion
from tests.passes.nets import Concatenation, Residual, masked, traced


def wide(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3), nn.BatchNorm2d(2 * width), nn.ReLU()),
        *(nn.Conv2d(2 * width, width, 1), nn.ReLU(), nn.Conv2d(width, 10, 1)),
    ).eval()


def select(model: nn.Module, **options: object) -> fx.GraphModule:
    module = fxprune.trace(model, torch.zeros(1, 3, 12, 12))
    return Pipeline((MaskInsertion(), ChannelSelection(**options)))(module).graph_module  # type: ignore[arg-type]


def left(module: fx.GraphModule) -> tuple[float, float]:
    """Return the shares of MACs and of parameters that the masks leave."""
    orbits = find_orbits(module)
    costs = CostModel(module, orbits)
    keep = kept_classes(module, orbits).double()
    whole, part = costs.cost(), costs.cost(keep)
    return part.macs / whole.macs, part.parameters / whole.parameters


def widths(module: fx.GraphModule) -> list[int]:
    return [int(module.get_buffer(o.mask).sum()) for o in find_orbits(module) if o.mask]


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("share", ["30%", "50%", 0.8])
def test_budgets_are_met_closely(scope: str, share: float | str) -> None:
    wanted = float(str(share).removesuffix("%")) / (100 if "%" in str(share) else 1)
    macs, _ = left(select(wide(), macs=share, scope=scope))
    assert wanted * 0.998 <= macs <= wanted
    _, parameters = left(select(wide(), parameters=share, scope=scope))
    assert wanted * 0.998 <= parameters <= wanted


def test_an_absolute_budget_is_a_count() -> None:
    module = select(wide(), macs=3_000_000)
    orbits = find_orbits(module)
    macs = CostModel(module, orbits).cost(kept_classes(module, orbits).double()).macs
    assert 3_000_000 * 0.998 <= macs <= 3_000_000


def test_ratios_say_what_is_removed() -> None:
    assert widths(select(wide(), ratio=0.25, scope="uniform")) == [48, 96, 48]
    assert sum(widths(select(wide(), ratio="25%"))) == 192
    assert widths(select(wide(), ratio={"0": 0.5, "orbit_2": 0.25})) == [32, 128, 48]
    assert widths(select(wide(), ratio={"Conv2d": 0.5})) == [32, 64, 32]


def test_constraints() -> None:
    assert all(w % 8 == 0 for w in widths(select(wide(), macs="40%", round_to=8)))
    assert min(widths(select(wide(), macs="10%", min_width=20))) >= 20
    assert widths(select(wide(), macs="60%", max_ratio=0.5))[0] >= 32
    assert widths(select(wide(), macs="60%", exclude=("0",)))[0] == 64
    assert widths(select(wide(), macs="60%", include=("3",)))[::2] == [64, 64]


def test_an_orbit_narrower_than_the_least_width_stays_whole() -> None:
    assert widths(select(wide(), ratio=0.5, scope="uniform", min_width=100)) == [64, 100, 64]
    assert widths(select(wide(8), ratio=0.5, scope="uniform", round_to=16)) == [8, 16, 8]


def test_the_least_important_channels_leave() -> None:
    model = wide(8)
    with torch.no_grad():
        model[0].weight[[1, 5]] *= 1e-3  # type: ignore[index]
    for criterion in ("l1", "l2"):
        module = select(model, ratio={"0": 0.25}, criterion=criterion)
        assert module.get_buffer("channel_masks.orbit_0").tolist() == [1, 0, 1, 1, 1, 0, 1, 1]


def test_fpgm_removes_what_others_can_replace() -> None:
    model = wide(8)
    with torch.no_grad():
        model[0].weight[2] = model[0].weight[[0, 1, 3, 4, 5, 6, 7]].mean(0)  # type: ignore[index]
    module = select(model, ratio={"0": 0.125}, criterion="fpgm")
    assert module.get_buffer("channel_masks.orbit_0").tolist() == [1, 1, 0, 1, 1, 1, 1, 1]


def test_batch_norm_scale_leaves_orbits_without_one() -> None:
    model = wide(8)
    with torch.no_grad():
        model[1].weight[3] = 1e-3  # type: ignore[index]
    module = select(model, ratio=0.125, criterion="bn-scale", scope="uniform")
    assert module.get_buffer("channel_masks.orbit_0").tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert widths(module)[2] == 8


def test_taylor_removes_what_the_loss_does_not_feel() -> None:
    model = wide(8)
    with torch.no_grad():
        model[3].weight[:, 4] = 0  # type: ignore[index]
    before = {name: p.clone() for name, p in model.named_parameters()}
    evidence = Evidence([torch.randn(4, 3, 12, 12)], lambda m, x: m(x).square().mean())
    module = select(model, ratio={"0": 0.125}, criterion="taylor", evidence=evidence)
    assert module.get_buffer("channel_masks.orbit_0").tolist() == [1, 1, 1, 1, 0, 1, 1, 1]
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_random_is_seeded() -> None:
    graphs = [select(wide(), macs="50%", criterion="random", seed=s) for s in (0, 0, 1)]
    masks = [graph.get_buffer("channel_masks.orbit_1") for graph in graphs]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_callable_is_a_criterion() -> None:
    module = select(wide(8), ratio={"0": 0.5}, criterion=lambda subject: torch.arange(float(subject.orbit.width)))
    assert module.get_buffer("channel_masks.orbit_0").tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_selection_keeps_the_graph() -> None:
    module = masked(Residual())
    graph = str(module.graph)
    assert ChannelSelection(ratio=0.5)(module).modified
    assert str(module.graph) == graph
    assert "get channel_masks.orbit_0 : keeps 2 of 4" in fxprune.dump(module)
    assert not ChannelSelection(ratio=0.0)(masked(Residual())).modified


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"taylor", "bn-scale"}))
def test_criteria_rank_classes_of_concatenations(criterion: str) -> None:
    module = masked(Concatenation())
    ChannelSelection(ratio=0.4, criterion=criterion)(module)
    assert sum(widths(module)) == 3


def test_a_criterion_with_nothing_to_go_by_is_refused() -> None:
    with pytest.raises(TargetError, match="has nothing to go by in any of the 2 orbits"):
        ChannelSelection(ratio=0.4, criterion="bn-scale")(masked(Concatenation()))


def test_needs_masks() -> None:
    with pytest.raises(UsageError, match="run mask-insertion before"):
        ChannelSelection(macs="50%")(traced(Residual()))
