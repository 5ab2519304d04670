"""Gates in graphs: where they stand and look, what they cost and expect, and that they cut exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune.errors import SpecError, TargetError, UsageError
from fxprune.gating.gates import Gates
from fxprune.graph.passes import Pipeline, parse_spec
from fxprune.labels.detection import find_orbits
from fxprune.runtime.gates import Gate, PredictedGate, TrainedGate
from fxprune.runtime.masks import gates_of
from passes import PASSES, ChannelSelection, ChannelSurgery, GateHardening, MaskInsertion, PlanApplication
from tests.laws import EXACT, as_double, assert_close, randomise, run
from tests.passes.nets import Concatenation, Residual, traced
from tests.test_random_graphs import PROGRAMS, SIZE, USES, RandomNet


class Sequence1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(3, 8, 5, padding=2), nn.Conv1d(8, 6, 3, padding=1), nn.Conv1d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(self.attention(x, x, x)[0])))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[int]]] = {
    "2-D": (Residual, (2, 3, 4, 4), {2}),
    "concatenation": (Concatenation, (2, 3, 4, 4), {2}),
    "1-D": (Sequence1d, (2, 3, 10), {1}),
    "3-D": (Volume, (1, 3, 4, 4, 4), {3}),
    "tokens": (Tokens, (2, 5, 12), {1}),
    "vectors": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2)), (3, 6), {0}),
}
"""Model, shape of its input, dimensions of space that its predictors see."""


def gated(model: nn.Module, example: Tensor, **options: object) -> fx.GraphModule:
    steps = (MaskInsertion(kind="gate", **options),)  # type: ignore[arg-type]
    return Pipeline(steps)(fxprune.trace(model, example)).graph_module


def decide(module: fx.GraphModule, seed: int, size: float = 5.0) -> None:
    """Set the logits of all gates at random; at least half of each gate's are not positive."""
    generator = torch.Generator().manual_seed(seed)
    for gate in gates_of(module).values():
        values = torch.randn(gate.units, generator=generator)
        set_logits(gate, size * (values - values.median()))


def set_logits(gate: Gate, values: Tensor | float) -> None:
    stored = gate.logit.data if isinstance(gate, TrainedGate) else gate.average
    stored.copy_(torch.as_tensor(values))


def cut(module: fx.GraphModule) -> fx.GraphModule:
    return Pipeline((GateHardening(), ChannelSurgery()))(module).graph_module


def test_golden(golden: Callable[[str, str], None]) -> None:
    model = Residual()
    gates = Pipeline((MaskInsertion(kind="gate", block=2),))(traced(model)).graph_module
    golden("mask_insertion_gates", fxprune.diff(traced(model), gates))
    decide(gates, 3)
    golden("gate_hardening", fxprune.diff(gates, Pipeline((GateHardening(),))(gates).graph_module))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"block": 2}, {"logits": "trained"}], ids=["single", "blocks", "trained"])
def test_hardened_gates_cut_exactly(case: str, options: dict[str, object]) -> None:
    """Law 1: what is cut equals the gated model in evaluation, and nothing of a gate stays."""
    build, shape, spatial = CASES[case]
    torch.manual_seed(0)
    model, x = build().double().eval(), torch.randn(shape, dtype=torch.float64)
    module = gated(model, x, **options)
    gates = gates_of(module)
    if options.get("logits") == "trained":
        assert all(isinstance(gate, TrainedGate) for gate in gates.values())
    else:
        assert {gate.spatial for gate in gates.values() if isinstance(gate, PredictedGate)} == spatial
        assert len(gates) == sum(isinstance(gate, PredictedGate) for gate in gates.values())
    module.train()(x)
    module.eval()
    decide(module, 1)
    expected, slim = module(x), cut(module)
    assert_close(slim(x), expected, "hardening and surgery", EXACT)
    assert_close(ChannelSurgery()(Pipeline(())(module).graph_module).graph_module(x), expected, "surgery alone", EXACT)
    assert slim.state_dict().keys() == fxprune.trace(model, x).state_dict().keys()
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in model.parameters())


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(PROGRAMS, USES, st.integers(0, 3), st.sampled_from([1, 2, 3]))
def test_gates_of_random_graphs_cut_exactly(
    program: list[tuple[str, int, int, int]], ends: list[int], seed: int, block: int
) -> None:
    torch.manual_seed(1)
    model = RandomNet(program, ends).double().eval()
    randomise(model, torch.Generator().manual_seed(seed))
    inputs = as_double(fxprune.Inputs.of(torch.randn(2, 3, SIZE, SIZE)))
    module = Pipeline((MaskInsertion(kind="gate", block=block),))(fxprune.trace(model, inputs)).graph_module
    decide(module, seed)
    assert_close(run(cut(module), inputs), run(module, inputs), "hardening and surgery", EXACT)
    for gate in gates_of(module).values():
        set_logits(gate, 1000.0)
    assert_close(run(_sampling(module), inputs), run(model, inputs), "gates of probability 1", 1e-12)


def _sampling(module: fx.GraphModule) -> fx.GraphModule:
    """Let the gates sample, and nothing else behave as in training; averages stay as they are."""
    for gate in gates_of(module).values():
        gate.train()
        if isinstance(gate, PredictedGate):
            gate.look = lambda _: None  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121", "shufflenet_v2_x0_5", "convnext_tiny"])
def test_expected_cost_is_the_hard_one_when_all_have_decided(name: str) -> None:
    """Probabilities of 0 and 1: expected, hard and counted multiply-accumulates are one number."""
    x = torch.zeros(1, 3, 64, 64)
    module = gated(torchvision.models.get_model(name).eval(), x, block=4)
    decide(module, 0)
    for gate in gates_of(module).values():
        set_logits(gate, torch.where(gate.logits() > 0, 1000.0, -1000.0))
    gates = Gates(module)
    logits = gates.logits()
    expected, slim = float(gates.expected_macs(logits)), cut(module)
    assert expected == pytest.approx(gates.hard_macs(logits), rel=1e-12)
    assert 0.05 < expected / gates.whole < 0.9
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        slim(x)
    assert expected == pytest.approx(counter.get_total_flops() / 2, rel=1e-9)
    assert gates.undecided(logits) == 0


def test_expected_cost_is_the_mean_over_samples() -> None:
    """Where the dimensions of every product are of different orbits."""
    module = gated(Sequence1d(), torch.zeros(1, 3, 10), logits="trained")
    decide(module, 2, 1.0)
    gates = Gates(module)
    logits = gates.logits().detach()
    torch.manual_seed(0)
    drawn = [float(gates._macs((torch.rand_like(logits) < logits.sigmoid()).double())) for _ in range(4000)]
    assert sum(drawn) / len(drawn) == pytest.approx(float(gates.expected_macs(logits)), rel=0.01)


def test_gradients_of_the_cost_and_the_entropy_reach_every_logit() -> None:
    module = gated(torchvision.models.mobilenet_v2().eval(), torch.zeros(1, 3, 64, 64))
    gates = Gates(module)
    for measure in (gates.expected_macs, gates.entropy):
        module.zero_grad()
        measure(gates.logits()).backward()
        assert all((gate.pointwise_bias.grad != 0).all() for gate in gates_of(module).values())


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_task_reach_every_logit(case: str) -> None:
    build, shape, _ = CASES[case]
    torch.manual_seed(0)
    model, x = build().double().eval(), torch.randn(shape, dtype=torch.float64)
    module = gated(model, x)
    module.train()(x).square().sum().backward()
    for name, gate in gates_of(module).items():
        assert (gate.pointwise_bias.grad != 0).all(), name


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-6, 6), min_size=14, max_size=14))
def test_entropy_by_definition(values: list[float]) -> None:
    module = gated(Sequence1d(), torch.zeros(1, 3, 10))
    p = torch.tensor(values, dtype=torch.float64).sigmoid()
    found = Gates(module).entropy(torch.tensor(values, dtype=torch.float64))
    torch.testing.assert_close(found, -(p * p.log() + (1 - p) * (1 - p).log()).mean())


def test_predictors_look_behind_the_largest_kernel() -> None:
    module = gated(torchvision.models.mobilenet_v2().eval(), torch.zeros(1, 3, 64, 64))
    watched = {str(node.target): node.args[0].name for node in module.graph.nodes if _is_gate(module, node)}
    orbits = find_orbits(module)
    depthwise = next(o for o in orbits if any(m.parameter == "features.2.conv.1.0.weight" for m in o.members))
    assert watched[str(depthwise.mask)] == "features_2_conv_1_0"
    stem = next(o for o in orbits if any(m.parameter == "features.0.0.weight" for m in o.members))
    assert watched[str(stem.mask)] == "features_0_0"


class Keywords(nn.Module):
    """A pointwise convolution, then a larger depthwise one as a function with its weight by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(nn.functional.conv2d(self.a(x), weight=self.b.weight, padding=2, groups=8))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_convolutions_that_are_functions_have_kernels_too(frontend: str) -> None:
    traced_graph = fxprune.trace(Keywords().eval(), torch.zeros(2, 3, 8, 8), frontend=frontend)
    module = Pipeline((MaskInsertion(kind="gate"),))(traced_graph).graph_module
    (watched,) = (node.args[0].name for node in module.graph.nodes if _is_gate(module, node))
    assert watched == ("conv2d" if frontend == "symbolic" else "conv2d_1")


def test_images_without_a_batch_have_both_dimensions_of_space() -> None:
    module = gated(Keywords().eval(), torch.zeros(3, 8, 8))
    (gate,) = gates_of(module).values()
    assert isinstance(gate, PredictedGate)
    assert (gate.spatial, gate.dim) == (2, 0)


def test_features_that_are_written_into_later_are_looked_at_before() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    for shape in ((4,), (3, 4)):
        gated(model.eval(), torch.zeros(shape)).train()(torch.randn(shape)).sum().backward()


def _is_gate(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), Gate)


def test_gates_are_transparent() -> None:
    """A gated graph has the orbits, the costs and the report of the plain one."""
    model, x = torchvision.models.resnet18().eval(), torch.zeros(1, 3, 64, 64)
    plain, module = fxprune.trace(model, x), gated(model, x)
    assert [str(orbit) for orbit in find_orbits(module)] == [str(orbit) for orbit in find_orbits(plain)]
    ours, theirs = (fxprune.CostModel(graph, find_orbits(graph)).cost() for graph in (module, plain))
    assert ours == theirs
    assert not MaskInsertion(kind="gate")(module).modified


def test_only_the_chosen_orbits_are_gated() -> None:
    model, x = torchvision.models.resnet18().eval(), torch.zeros(1, 3, 64, 64)
    module = gated(model, x, include=("layer1.*",), exclude=("layer1.0.conv1",))
    orbits = {orbit.mask: orbit for orbit in find_orbits(module)}
    layers = {layer for name in gates_of(module) for layer in orbits[name].layers}
    assert "layer1.1.conv1" in layers
    assert "layer1.0.conv1" not in layers
    assert not any(layer.startswith("layer2") for layer in layers)


def test_statistical_orbits_are_gated_on_request_only() -> None:
    model, x = torchvision.models.vit_b_16(image_size=32, num_classes=2).eval(), torch.zeros(1, 3, 32, 32)
    exact, all_of_them = (gated(model, x, allow_statistical=allowed) for allowed in (False, True))
    orbits = [orbit for orbit in find_orbits(exact) if orbit.mask is not None]
    assert len(gates_of(exact)) == sum(orbit.statistical is None for orbit in orbits)
    assert len(gates_of(all_of_them)) == len(orbits) > len(gates_of(exact))


def test_an_orbit_of_one_block_keeps_its_mask() -> None:
    module = gated(Sequence1d(), torch.zeros(1, 3, 10), block=7)
    assert sorted(gate.width for gate in gates_of(module).values()) == [8]
    assert gates_of(gated(Sequence1d(), torch.zeros(1, 3, 10), block=8)) == {}


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("share", ["75%", "50%", 0.25])
def test_hardening_meets_a_target_by_the_order_of_the_logits(share: str | float, block: int) -> None:
    x = torch.zeros(1, 3, 64, 64)
    module = gated(torchvision.models.resnet18().eval(), x, block=block)
    decide(module, 0)
    gates = Gates(module)
    slim = Pipeline((GateHardening(share), ChannelSurgery()))(module).graph_module
    whole, left = gates.whole, fxprune.CostModel(slim, find_orbits(slim)).cost().macs
    wanted = float(str(share).rstrip("%")) / (100 if "%" in str(share) else 1)
    assert wanted * (0.99 if block > 1 else 0.998) <= left / whole <= wanted
    for orbit, gate in gates.pairs:
        kept = gates.within(wanted * whole)[str(orbit.mask)].view(-1, block)
        assert ((kept.sum(1) == 0) | (kept.sum(1) == block)).all(), "a block was divided"
        assert kept.any(), "an orbit lost everything"
        logits, stays = gate.logits(), kept.any(1)
        assert stays.all() or logits[stays].max() > logits[~stays].max(), "the best block left"


def test_hardening_follows_the_order_of_the_logits() -> None:
    """Of one orbit the least probable blocks leave."""
    module = gated(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 3)), torch.zeros(1, 3, 8, 8))
    decide(module, 5)
    (name, gate), gates = next(iter(gates_of(module).items())), Gates(module)
    for share in (0.8, 0.5, 0.1):
        kept = gates.within(share * gates.whole)[name] > 0
        assert 0 < int(kept.sum()) < 16
        assert gate.logits()[kept].min() > gate.logits()[~kept].max()


def test_of_equal_logits_one_block_stays_whoever_is_asked() -> None:
    module = gated(torchvision.models.resnet18().eval(), torch.zeros(1, 3, 32, 32), block=16)
    for gate in gates_of(module).values():
        set_logits(gate, -9.0)
    gates = Gates(module)
    assert all(int(mask.sum()) == 16 for mask in gates.masks().values())
    assert gates.hard_macs(gates.logits()) < 0.05 * gates.whole
    assert gates.masks().keys() == gates.within(gates.hard_macs(gates.logits())).keys()
    for name, mask in gates.within(gates.hard_macs(gates.logits())).items():
        assert torch.equal(mask, gates.masks()[name].double())


def test_an_unreachable_target_says_what_is_reachable() -> None:
    module = gated(torchvision.models.resnet18().eval(), torch.zeros(1, 3, 64, 64), block=32)
    with pytest.raises(TargetError, match=r"cannot be reached: the minimum is [\d,]+ \("):
        GateHardening("1%")(module)


def test_specs_of_gates_read_back() -> None:
    spec = "mask-insertion{kind=gate,block=32,logits=trained,include=layer1.*|fc},gate-hardening{macs=50%}"
    steps = parse_spec(spec, PASSES)
    assert steps == (
        MaskInsertion(kind="gate", block=32, logits="trained", include=("layer1.*", "fc")),
        GateHardening("50%"),
    )
    assert ",".join(map(str, steps)) == spec


def test_hardening_leaves_graphs_without_gates_alone() -> None:
    assert not GateHardening()(traced(Residual())).modified
    assert not GateHardening("50%")(Pipeline((MaskInsertion(),))(traced(Residual())).graph_module).modified


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "gates"}, r"unknown kind of masks 'gates'; known kinds: mask, gate"),
        ({"logits": "predict"}, r"unknown logits 'predict'; did you mean 'predicted'\?"),
        ({"block": 0}, r"block of gates is 0; give a whole number, 1 or more"),
        ({"block": 1.5}, r"block of gates is 1\.5; give a whole number"),
        ({"initial": math.nan}, r"initial of gates is nan; give a number"),
        ({"temperature": 0.0}, r"temperature of gates is 0\.0; give a number above 0"),
        ({"momentum": 1.0}, r"momentum of gates is 1\.0; give a number in \[0, 1\)"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        MaskInsertion(**{"kind": "gate", **options})  # type: ignore[arg-type]


def test_others_do_not_write_into_gates() -> None:
    module = gated(Residual().eval(), torch.zeros(2, 3, 4, 4))
    with pytest.raises(UsageError, match="run gate-hardening before channel-selection"):
        ChannelSelection(ratio=0.5)(module)
    with pytest.raises(UsageError, match="run gate-hardening before plan-application"):
        PlanApplication(fxprune.Plan(()))(module)
    with pytest.raises(UsageError, match="the graph has no gates"):
        Gates(traced(Residual()))


def test_gates_do_not_forget_what_is_masked() -> None:
    module = Pipeline((MaskInsertion(), ChannelSelection(ratio=0.5)))(traced(Residual())).graph_module
    with pytest.raises(UsageError, match="insert gates before selecting"):
        MaskInsertion(kind="gate")(module)


def test_masks_that_are_there_become_gates() -> None:
    masked = Pipeline((MaskInsertion(),))(traced(Residual())).graph_module
    assert MaskInsertion(kind="gate")(masked).modified
    assert gates_of(masked)
