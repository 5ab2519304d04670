"""Laws of sparse models: what is reached, counted, kept by training, cut, saved."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.api.weights import make_step
from fxprune.errors import InputError, SpecError, TargetError, UsageError
from fxprune.graph.inputs import Inputs
from fxprune.graph.passes import parse_spec
from fxprune.plan import Plan
from fxprune.runtime.weight_masks import WeightMask, mask_weight, masked_weights
from fxprune.sparsity.layers import find_layers, mask_of
from fxprune.sparsity.masks import SparseGraph
from fxprune.sparsity.selection import uniform_sparsity
from passes import PASSES
from tests.laws import EXACT, assert_close, assert_laws
from tests.sparsity.nets import (
    Bottleneck,
    Kinds,
    Padded,
    Reader,
    Renamed,
    Standardised,
    Tied,
    count_macs,
    count_parameters,
    image,
)

LINE = torch.rand(2, 8, 12, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(6).view(1, 6)
NETS: tuple[tuple[Callable[[], nn.Module], Tensor], ...] = ((Bottleneck, image()), (Kinds, LINE))


def _bottleneck() -> nn.Module:
    torch.manual_seed(0)
    return Bottleneck().eval()


def _sorted(plan: Plan) -> Plan:
    """Return a plan whose orbits list their places by name: those of parametrised tensors come in another order."""
    return replace(plan, orbits=tuple(replace(orbit, places=tuple(sorted(orbit.places))) for orbit in plan.orbits))


def _sparsities(result: fxprune.Result) -> dict[str, float]:
    return {name: 1 - float(mask.mask.float().mean()) for name, mask in masked_weights(result.module).items()}


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(NETS),
    st.sampled_from(["sparsity", "macs", "parameters"]),
    st.sampled_from(["uniform", "global"]),
    st.sampled_from(["1x1", "1x4", "2x2", "3x5"]),
    st.floats(0.05, 0.6),
)
def test_targets_are_met_and_counted_from_the_tensors(
    net: tuple[Callable[[], nn.Module], Tensor], what: str, scope: str, block: str, share: float
) -> None:
    torch.manual_seed(1)
    model, inputs = net[0]().eval(), net[1]
    before = copy.deepcopy(model.state_dict())
    target: dict[str, Any] = {what: share if what == "sparsity" else 1 - share}
    try:
        result = fxprune.sparsify(model, inputs, layers=["all"], scope=scope, block=block, **target)
    except TargetError as error:
        assert "the minimum is" in str(error)  # noqa: PT017 - layers too small for the block cannot give that much
        return
    macs, parameters = result.report.macs, result.report.parameters
    assert macs[1] == count_macs(result.module, inputs)
    assert parameters[1] == count_parameters(result.module)
    assert macs[0] == count_macs(model, inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model changed"
    if what == "macs":
        assert macs[1] <= target["macs"] * macs[0] + 1e-6
    if what == "parameters":
        assert parameters[1] <= target["parameters"] * parameters[0] + 1e-6
    if what == "sparsity":
        masks = list(masked_weights(result.module).values())
        zeros, total = sum(int((~m.mask).sum()) for m in masks), sum(m.mask.numel() for m in masks)
        assert zeros >= share * total - 1e-6


def test_uniform_is_equation_1() -> None:
    model, x = _bottleneck(), image()
    graph = SparseGraph(fxprune.trace(model, x))
    inside = sum(layer.uses * layer.shape.numel() for layer in graph.layers if layer.is_kind("conv1x1"))
    wanted = uniform_sparsity(graph.whole["macs"], 0.75 * graph.whole["macs"], inside)
    found = _sparsities(fxprune.sparsify(model, x, macs="75%", block="1x1"))
    assert found.keys() == {"expand.weight", "project.weight"}
    for name, sparsity in found.items():
        size = model.get_parameter(name).numel()
        assert sparsity == pytest.approx(math.ceil(wanted * size) / size)


def test_global_takes_the_least_weights_of_all_layers() -> None:
    model = _bottleneck()
    result = fxprune.sparsify(model, image(), sparsity=0.5, scope="global", block="1x1", layers=["all"])
    kept, gone = [], []
    for name, mask in masked_weights(result.module).items():
        weight = model.get_parameter(name).abs()
        kept.append(weight[mask.mask])
        gone.append(weight[~mask.mask])
    assert torch.cat(gone).max() <= torch.cat(kept).min()


def test_blocks_are_along_the_input_channels_of_every_tap() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 4, 3))
    result = fxprune.sparsify(model, torch.rand(1, 8, 5, 5), sparsity=0.5, layers=["conv"])
    mask = masked_weights(result.module)["0.weight"].mask
    tiles = mask.permute(0, 2, 3, 1).reshape(-1, 4)
    assert torch.equal(tiles.any(1), tiles.all(1))
    assert not tiles.all()


def test_channels_that_are_no_multiple_of_the_block_end_in_a_smaller_one() -> None:
    result = fxprune.sparsify(_bottleneck(), image(), sparsity=0.5, layers=["expand"])
    mask = masked_weights(result.module)["expand.weight"].mask.view(20, 6)
    assert torch.equal(mask[:, 4], mask[:, 5])
    assert (mask[:, :4] == mask[:, :1]).all()


def test_layers_too_small_for_a_block_stay_dense_and_are_named() -> None:
    result = fxprune.sparsify(_bottleneck(), image(), sparsity=0.5, layers=["all"])
    assert result.report.notes == ("layers with fewer channels than a block of 1x4 stay dense: stem, depthwise",)
    assert masked_weights(result.module).keys() == {"expand.weight", "project.weight", "head.weight"}


def test_sparsity_of_single_layers() -> None:
    found = _sparsities(fxprune.sparsify(_bottleneck(), image(), sparsity={"exp*": 0.5, "linear": "20%"}, block="1x1"))
    assert found == {"expand.weight": pytest.approx(0.5), "head.weight": pytest.approx(0.2)}


def test_the_macs_of_another_model_are_a_target() -> None:
    torch.manual_seed(0)
    large, small = torchvision.models.mobilenet_v2(width_mult=0.5), torchvision.models.mobilenet_v2(width_mult=0.35)
    x = torch.rand(1, 3, 64, 64)
    result = fxprune.sparsify(large.eval(), x, macs=small.eval())
    wanted = fxprune.sparsify(small, x, sparsity=0.5).report.macs[0]
    assert wanted * 0.998 < result.report.macs[1] <= wanted


def test_the_same_seed_gives_the_same_masks() -> None:
    def random(seed: int) -> dict[str, Tensor]:
        result = fxprune.sparsify(_bottleneck(), image(), sparsity=0.5, criterion="random", seed=seed)
        return {name: mask.mask for name, mask in masked_weights(result.module).items()}

    first, again, other = random(0), random(0), random(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_criterion_of_ones_own() -> None:
    result = fxprune.sparsify(
        _bottleneck(), image(), sparsity=0.5, block="1x1", layers=["head"], criterion=lambda _, weight: -weight + 9
    )
    mask, weight = masked_weights(result.module)["head.weight"].mask, _bottleneck().get_parameter("head.weight")
    assert weight[~mask].min() > weight[mask].max()


def test_a_criterion_that_writes_into_its_weight_leaves_the_model_alone() -> None:
    model, before = _bottleneck(), _bottleneck().get_parameter("expand.weight")
    result = fxprune.sparsify(model, image(), sparsity=0.5, block="1x1", criterion=lambda _, weight: weight.abs_())
    assert torch.equal(model.get_parameter("expand.weight"), before)
    mask = masked_weights(result.module)["expand.weight"].mask
    assert torch.equal(result.module.expand.weight, before * mask)  # type: ignore[union-attr]


def test_tied_weights_have_one_mask_and_stay_tied() -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    result = fxprune.sparsify(model, TOKENS, sparsity=0.5, layers=["head"])
    module = result.module
    head, embedding = module.get_submodule("head"), module.get_submodule("embedding")
    assert torch.equal(head.weight, embedding.weight)  # type: ignore[arg-type]
    assert head.parametrizations.weight.original is embedding.parametrizations.weight.original  # type: ignore[union-attr]
    assert result.report.parameters[1] == count_parameters(module) == result.report.parameters[0] - 48
    again = copy.deepcopy(module)
    assert again.head.parametrizations.weight[0] is again.embedding.parametrizations.weight[0]
    fxprune.finalize(module)
    assert module.head.weight is module.embedding.weight


def test_tied_weights_are_counted_once_and_no_row_is_negative() -> None:
    report = fxprune.sparsify(Tied().eval(), TOKENS, sparsity=0.5, layers=["head"]).report
    assert {row.layer: row.parameters for row in report.layers}["embedding"] == (96, 48)
    assert min(min(row.parameters) for row in report.layers) == 0
    assert sum(row.parameters[1] for row in report.layers) == report.parameters[1]


def test_a_weight_with_two_names_stays_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Renamed().eval(), torch.rand(2, 8)
    result = fxprune.sparsify(model, x, sparsity=0.5, layers="all")
    module = result.module
    assert torch.equal(module.layer.weight, module.reader.matrix)  # type: ignore[union-attr, arg-type]
    expected = module(x)
    fxprune.save(result, tmp_path / "saved")
    assert torch.equal(fxprune.load(tmp_path / "saved", Renamed().eval()).module(x), expected)
    assert torch.equal(fxprune.finalize(module)(x), expected)
    assert module.layer.weight is module.reader.matrix  # type: ignore[union-attr]


def test_a_weight_that_the_graph_itself_holds_stays_dense() -> None:
    class Root(Reader):
        def __init__(self) -> None:
            layer = nn.Linear(8, 8)
            super().__init__(layer.weight)
            self.layer, self.other = layer, nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.layer(self.other(x)))

    result = fxprune.sparsify(Root().eval(), torch.rand(2, 8), sparsity=0.5, layers="all")
    assert masked_weights(result.module).keys() == {"other.weight"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weights_that_cannot_be_masked_are_named() -> None:
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Conv2d(4, 8, 1)), Standardised(8, 8, 1), Padded(8, 8, 1), nn.LSTM(4, 4)
    )
    x = torch.rand(1, 4, 4, 4)
    result = fxprune.sparsify(model[:3].eval(), x, sparsity=0.5)
    assert masked_weights(result.module).keys() == {"2.weight"}
    assert result.report.notes == (
        "weights that no convolution or linear layer reads as they are stay dense: 0.weight_v, 1.weight",
    )
    assert result.report.macs[1] == result.report.macs[0] - 8 * 8 // 2 * 4 * 6


def test_weights_that_functions_read_are_named_where_they_are_asked_for() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Reader(nn.Parameter(torch.rand(8, 8)))).eval()
    result = fxprune.sparsify(model, torch.rand(2, 8), sparsity=0.5, layers="linear")
    assert result.report.notes == (
        "weights that no convolution or linear layer reads as they are stay dense: 1.matrix",
    )
    assert fxprune.sparsify(model, torch.rand(2, 8), sparsity=0.5, layers="0").report.notes == ()


def test_a_model_without_layers_to_mask_is_refused() -> None:
    for model, frontend in ((nn.Linear(8, 8), "symbolic"), (nn.Sequential(nn.Linear(8, 8)), "export")):
        with pytest.raises(SpecError, match="calls no convolution or linear layer"):
            fxprune.sparsify(model.eval(), torch.rand(2, 8), sparsity=0.5, layers="all", frontend=frontend)


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(InputError, match="on the meta device"):
        fxprune.sparsify(_bottleneck().to("meta"), image().to("meta"), sparsity=0.5)


def test_layers_without_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 0)).eval()
    result = fxprune.sparsify(model, torch.rand(2, 8), sparsity=0.5, layers="all")
    assert result.report.macs == (128, 64)
    with pytest.raises(TargetError, match="no layer can be made sparse"):
        fxprune.sparsify(model[1:], torch.rand(2, 8), sparsity=0.5, layers="all")


def test_a_pair_of_sizes_is_a_block_with_a_spelling() -> None:
    step = make_step(Inputs.of(image()), "auto", sparsity=0.5, block=(2, 3))
    assert str(step) == "weight-sparsification{sparsity=0.5,block=2x3}"
    assert parse_spec(str(step), PASSES) == (step,)


def test_a_finalized_model_pickles() -> None:
    x, result = image(), fxprune.sparsify(_bottleneck(), image(), sparsity=0.5)
    module = fxprune.finalize(result.module)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


def test_making_a_sparse_model_sparser_keeps_its_zeros() -> None:
    x, model = image(), _bottleneck()
    half = fxprune.sparsify(model, x, sparsity=0.5, block="1x1")
    more = fxprune.sparsify(half.module, x, sparsity=0.75, block="1x1")
    straight = fxprune.sparsify(model, x, sparsity=0.75, block="1x1")
    for name, mask in masked_weights(more.module).items():
        assert not (mask.mask & ~masked_weights(half.module)[name].mask).any()
        assert torch.equal(mask.mask, masked_weights(straight.module)[name].mask)
    assert more.plan.spec == (
        "weight-sparsification{sparsity=0.5,block=1x1},weight-sparsification{sparsity=0.75,block=1x1}"
    )


def test_training_keeps_zeros() -> None:
    result = fxprune.sparsify(_bottleneck(), image(), sparsity=0.8)
    module, masks = result.module.train(), masked_weights(result.module)
    weights = {name: mask.mask.clone() for name, mask in masks.items()}
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.rand(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    for name, mask in weights.items():
        layer = module.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.weight != 0, mask)  # type: ignore[arg-type]


def test_the_state_dict_of_a_sparse_model_loads_into_another() -> None:
    x = image()
    first = fxprune.sparsify(_bottleneck(), x, sparsity=0.8)
    other = fxprune.sparsify(Bottleneck().eval(), x, sparsity=0.1)
    other.module.load_state_dict(first.module.state_dict())
    assert torch.equal(other.module(x), first.module(x))


def test_finalizing_bakes_masks_in_and_leaves_copies_alone() -> None:
    x, model = image(), _bottleneck()
    module = fxprune.sparsify(model, x, sparsity=0.8).module
    copied, before = copy.deepcopy(module), module(x)
    assert fxprune.finalize(module) is module
    assert module.state_dict().keys() == model.state_dict().keys()
    assert type(module.get_submodule("expand")) is nn.Conv2d
    assert torch.equal(module(x), before)
    assert torch.equal(copied(x), before)
    assert len(masked_weights(copied)) == 2


@pytest.mark.parametrize("block", ["1x1", "1x4"])
def test_surgery_cuts_masks_with_their_weights(block: str) -> None:
    """Laws 1 and 2: channels leave a sparse graph exactly, and what is sparse is counted on the slim one."""
    x = image()
    sparse = fxprune.sparsify(_bottleneck(), x, sparsity=0.5, block=block, layers=["all"]).module
    assert_laws(sparse, x)
    sparse = fxprune.sparsify(_bottleneck(), x, sparsity=0.5, block=block, layers=["all"]).module
    slim = fxprune.prune(sparse, x, ratio=0.5, scope="uniform")
    assert slim.report.macs[1] == count_macs(slim.module, x)
    assert slim.report.parameters[1] == count_parameters(slim.module)
    assert slim.report.macs[0] == count_macs(sparse, x)


def test_surgery_and_sparsity_in_either_order_have_equal_plans_of_channels() -> None:
    x, model = image(), _bottleneck()
    slim = fxprune.prune(model, x, ratio=0.5, scope="uniform", criterion="random")
    ones = fxprune.sparsify(model, x, sparsity=0)
    other = fxprune.prune(ones.module, x, ratio=0.5, scope="uniform", criterion="random")
    assert _sorted(other.plan).orbits == _sorted(slim.plan).orbits
    assert_close(other.module(x), slim.module(x), "masks of ones", EXACT)


@pytest.mark.parametrize("order", ["sparse", "slim, sparse", "sparse, slim"])
def test_saved_results_load_to_the_bit(tmp_path: Path, order: str) -> None:
    x, module = image(), _bottleneck()
    for job in order.split(", "):
        result = (
            fxprune.sparsify(module, x, sparsity=0.5, layers=["all"])
            if job == "sparse"
            else fxprune.prune(module, x, ratio=0.5, scope="uniform")
        )
        module = result.module
    fxprune.save(result, tmp_path / "saved")
    loaded = fxprune.load(tmp_path / "saved", Bottleneck().eval())
    assert Plan.from_json(result.plan.to_json()) == result.plan
    assert _sorted(loaded.plan) == _sorted(result.plan)
    assert torch.equal(loaded.module(x), result.module(x))
    masks = masked_weights(result.module)
    for name, mask in masked_weights(loaded.module).items():
        assert torch.equal(mask.mask, masks[name].mask)
    replayed = fxprune.apply_plan(_bottleneck(), x, result.plan)
    assert masked_weights(replayed.module).keys() == masks.keys()


def test_weight_norm_is_masked_where_it_acts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4)).eval()
    result = fxprune.sparsify(model, torch.rand(1, 8), sparsity=0.5, layers=["linear"])
    weight: Tensor = result.module.get_submodule("0").weight  # type: ignore[assignment]
    assert int((weight == 0).sum()) == 32
    assert result.report.layers[0].sparsity == (0.0, 0.5)


def test_saving_a_spectral_norm_in_training_keeps_what_it_gives_in_evaluation(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.ReLU())

    x = torch.rand(2, 8)
    result = fxprune.sparsify(build(), x, sparsity=0.5, layers="all")
    fxprune.save(result, tmp_path / "saved")
    loaded = fxprune.load(tmp_path / "saved", build()).module
    assert torch.equal(loaded.eval()(x), result.module.eval()(x))


def test_half_precision_criteria_may_sum_to_more_than_it_holds() -> None:
    model = nn.Sequential(nn.Linear(512, 512)).half().eval()
    result = fxprune.sparsify(
        model, torch.rand(1, 512).half(), sparsity=0.5, layers="all", criterion=lambda _, w: w.abs() + 1
    )
    assert result.report.sparsity[1] > 0.49


def test_a_layer_without_weights_left_is_named() -> None:
    result = fxprune.sparsify(
        _bottleneck(),
        image(),
        sparsity=0.5,
        scope="global",
        block="1x1",
        criterion=lambda name, w: torch.full_like(w, name == "project"),
    )
    assert "layers with no weight left give the same for every input: expand" in result.report.notes


def test_the_layers_of_a_graph() -> None:
    graph = fxprune.trace(Kinds(), LINE)
    layers = {layer.name: layer for layer in SparseGraph(graph).layers}
    assert list(layers) == ["line", "grouped", "twice", "up"]
    assert layers["twice"].nodes == ("twice", "twice_1")
    assert layers["twice"].uses == 2 * 2 * 12
    assert (layers["up"].output_dim, layers["up"].input_dim) == (1, 0)
    assert [layer.name for layer in layers.values() if layer.is_kind("conv1x1")] == ["grouped"]
    assert mask_of(layers["up"]) is None


BAD: list[tuple[dict[str, Any], type[UsageError], str]] = [
    ({}, TargetError, "exactly one target of sparsity, macs, parameters; got none"),
    ({"sparsity": 0.5, "macs": 0.5}, TargetError, "got sparsity, macs"),
    ({"sparsity": 1.0}, TargetError, r"sparsity=1.0 is outside \[0, 1\)"),
    ({"sparsity": "much"}, TargetError, "cannot read sparsity='much'"),
    ({"macs": 0}, TargetError, "macs=0 is not positive"),
    ({"macs": 1e12}, TargetError, "more than the model has"),
    ({"macs": "1%"}, TargetError, r"macs=1% cannot be reached when 2 layers \(conv1x1\) lose at most 100%"),
    ({"sparsity": 0.9, "max_sparsity": 0.5}, TargetError, "lose at most 50%"),
    ({"sparsity": 0.5, "max_sparsity": 0}, TargetError, r"fraction in \(0, 1\]"),
    ({"sparsity": 0.5, "scope": "local"}, SpecError, "unknown scope 'local'"),
    ({"sparsity": 0.5, "criterion": "magnitud"}, SpecError, "did you mean 'magnitude'"),
    ({"sparsity": 0.5, "block": "1by4"}, SpecError, "cannot read the block '1by4'"),
    ({"sparsity": 0.5, "block": (1, 2, 3)}, SpecError, r"cannot read the block \(1, 2, 3\)"),
    ({"sparsity": 0.5, "block": (1, 4.0)}, SpecError, r"cannot read the block \(1, 4.0\)"),
    ({"sparsity": {"conv": 0.9}, "max_sparsity": 0.5}, TargetError, "sparsity of 90.0% cannot be reached"),
    ({"macs": "1%", "layers": "all"}, TargetError, r"Raise the target or max_sparsity$"),
    ({"sparsity": 0.5, "criterion": lambda _, weight: -weight.abs()}, SpecError, "is negative for 'expand'"),
    ({"sparsity": 0.5, "block": "1x64"}, TargetError, "has 1x64 channels"),
    ({"sparsity": 0.5, "layers": ["expnd"]}, SpecError, "did you mean 'expand'"),
    ({"sparsity": 0.5, "layers": ["norm"]}, SpecError, "no convolution or linear layer matches 'norm'"),
    ({"sparsity": 0.5, "layers": ["head"], "exclude": ["linear"]}, TargetError, "excluded"),
    ({"sparsity": {"conv5x5": 0.5}}, SpecError, "conv5x5"),
    ({"sparsity": {"conv": 0.5}, "layers": ["conv"]}, SpecError, "leave out layers"),
    ({"sparsity": 0.5, "criterion": lambda _, weight: weight.sum()}, SpecError, "weight's shape"),
    ({"sparsity": 0.5, "criterion": lambda _, weight: (weight / 0).abs()}, InputError, "not finite"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_one_clear_error(options: dict[str, Any], kind: type[UsageError], message: str) -> None:
    with pytest.raises(kind, match=message):
        fxprune.sparsify(_bottleneck(), image(), **options)


def test_a_plan_for_another_model_is_refused() -> None:
    plan = fxprune.sparsify(_bottleneck(), image(), sparsity=0.5).plan
    with pytest.raises(UsageError, match="the plan is for another model: it has a mask of shape"):
        fxprune.apply_plan(torchvision.models.squeezenet1_1().eval(), torch.rand(1, 3, 64, 64), plan)


@pytest.mark.parametrize("kept", ["", "?", "eJwDAAAAAAE="])
def test_a_damaged_mask_is_refused(kept: str) -> None:
    plan = fxprune.sparsify(_bottleneck(), image(), sparsity=0.5).plan
    text = plan.to_json().replace(plan.weights[0].kept, kept)
    with pytest.raises(UsageError, match="the plan is malformed: ValueError: 'kept' of expand"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("found", "damaged"),
    [
        ('"dims": [0, 1]', '"dims": [0, 5]'),
        ('"dims": [0, 1]', '"dims": [1, 1]'),
        ('"shape": [20, 6, 1, 1]', '"shape": []'),
        ('"shape": [20, 6, 1, 1]', '"shape": [20, 0]'),
        ('"block": "1x4"', '"block": "1x0"'),
        ('"frontend": "symbolic"', '"frontend": []'),
        ('"weights": [', '"weights": [7, '),
    ],
)
def test_a_damaged_plan_is_one_clear_error(found: str, damaged: str) -> None:
    text = fxprune.sparsify(_bottleneck(), image(), sparsity=0.5).plan.to_json()
    assert found in text
    with pytest.raises(UsageError, match="the plan is malformed"):
        Plan.from_json(text.replace(found, damaged))


def test_half_precision_and_frozen_weights_keep_what_they_are() -> None:
    model = _bottleneck().to(torch.bfloat16).requires_grad_(False)
    module = fxprune.sparsify(model, image().to(torch.bfloat16), sparsity=0.5).module
    weight: Tensor = module.get_submodule("expand").weight  # type: ignore[assignment]
    assert weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_masks_of_the_user_are_found() -> None:
    model = _bottleneck()
    mask_weight([(model.get_submodule("expand"), "weight")], torch.zeros(20, 6, 1, 1, dtype=torch.bool))
    layers = find_layers(fxprune.trace(model, image()), {})
    assert [layer.name for layer in layers if mask_of(layer) is not None] == ["expand"]
    assert isinstance(next(iter(masked_weights(model).values())), WeightMask)
