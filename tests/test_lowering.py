"""Lowered models: what computes what, saved and loaded, compiled, copied, pickled and called at once; bad input."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import fxprune
from fxprune import artifacts
from fxprune.errors import ArtifactError, InputError, PlanError, SpecError, TargetError
from fxprune.graph.passes import PassEvent
from fxprune.lowering.measuring import FLOAT, LayerTimes, Stopwatch
from fxprune.plan import Plan
from fxprune.quantization.ranges import Range
from fxprune.runtime.int8 import BlockSparseInt8Linear
from fxprune.training.learned_thresholds import attach_thresholds


class Net(nn.Module):
    """An inverted residual without its middle, activations that are bounds and tables, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.expand, self.act = nn.Conv2d(8, 16, 1), nn.Hardswish()
        self.middle, self.project = nn.Conv2d(16, 12, 1), nn.Conv2d(12, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = self.project(torch.relu(self.middle(self.act(self.expand(x)))))
        return self.fc((x + y).mean((2, 3)))


class Mobile(nn.Module):
    """An inverted residual with its depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.act = nn.Conv2d(3, 16, 1), nn.ReLU6(inplace=True)
        self.depthwise, self.norm = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16), nn.BatchNorm2d(16)
        self.project = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.act(self.norm(self.depthwise(self.act(self.expand(x))))))


IMAGE = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
OTHERS = torch.rand(3, 3, 9, 5, generator=torch.Generator().manual_seed(2))


def _build(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    nn.init.uniform_(model.norm.running_mean)  # type: ignore[arg-type]
    return model


def _lower(model: nn.Module | None = None, **how: Any) -> fxprune.Result:
    options = {"calibration": [IMAGE], "backend": "native"} | how
    return fxprune.lower(_build() if model is None else model, IMAGE, **options)


@pytest.fixture
def result() -> fxprune.Result:
    return _lower(sparsity="50%")


@pytest.fixture
def saved(result: fxprune.Result, tmp_path: Path) -> Path:
    return fxprune.save(result, tmp_path / "lowered")


def _layers(module: nn.Module) -> dict[str, BlockSparseInt8Linear]:
    return {name: part for name, part in module.named_modules() if isinstance(part, BlockSparseInt8Linear)}


def _runs(result: fxprune.Result) -> dict[str, str]:
    return {row.layer: row.runs for row in result.report.lowering}


def _assert_same(found: nn.Module | Callable[[Tensor], Tensor], expected: nn.Module) -> None:
    for x in (IMAGE, OTHERS):
        assert torch.equal(found(x), expected(x))


def test_layers_are_lowered_and_the_rest_says_why_not(result: fxprune.Result) -> None:
    fits = dict.fromkeys(["expand", "middle", "project"], "native 1x4")
    assert _runs(result) == {"stem": "float", **fits, "fc": "native dense"}
    rows = {row.layer: row for row in result.report.lowering}
    assert rows["stem"].reason.startswith("no rule says how a Conv2d computes on uint8")
    assert (rows["expand"].shape, rows["expand"].sparsity) == ((72, 8, 16), 0.5)
    assert {name: layer.sparsity for name, layer in _layers(result.module).items()}["middle"] == 0.5
    outputs, floats = result.module(IMAGE), result.masked(IMAGE)  # type: ignore[misc]
    assert (outputs - floats).abs().max() < 0.1 * floats.abs().max()
    assert not result.module.training


def test_the_report_has_a_table_and_totals(result: fxprune.Result) -> None:
    text = result.report.table()
    assert "expand 72 × 8 × 16 50.0% native 1x4" in " ".join(text.split())
    assert "Of 5 layers 3 run native 1x4, 1 run float, 1 run native dense." in result.report.totals()
    assert result.report.sparsity[1] > 0
    assert fxprune.Report.from_json(result.report.json()) == result.report


def test_the_model_stays_as_it_is() -> None:
    model = _build()
    before, outputs = copy.deepcopy(model.state_dict()), model(IMAGE)
    _lower(model, sparsity="50%")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(IMAGE), outputs)


def test_zeros_that_a_model_has_are_kept() -> None:
    sparse = fxprune.sparsify(_build(), IMAGE, sparsity="75%").module
    for model in (sparse, fxprune.finalize(copy.deepcopy(sparse))):
        lowered = _lower(model)
        assert {layer.sparsity for layer in _layers(lowered.module).values()} == {0.75, 0.0}
        _assert_same(lowered.module, _lower(sparse).module)


def test_layers_are_chosen_by_kind_name_and_exclusion() -> None:
    assert _runs(_lower(layers="conv1x1"))["fc"] == "float"
    only = _lower(layers=["fc", "middle"], exclude="middle", sparsity=0.5)
    assert [name for name, runs in _runs(only).items() if runs != "float"] == ["fc"]
    assert [row.layer for row in only.plan.weights] == ["fc"]
    assert {row.layer: row.reason for row in only.report.lowering}["middle"] == "it was excluded"
    by_name = _lower(sparsity={"middle": 0.5}, exclude=["project"])
    assert [row.layer for row in by_name.plan.weights] == ["middle"]


def test_backends_and_blocks_are_chosen_by_layer() -> None:
    result = _lower(backend={"expand": "reference", "fc": "onednn 1x4"}, block="2x4", sparsity=0.5)
    expected = {"expand": "reference 2x4", "middle": "native 2x4", "project": "native 2x4", "fc": "onednn 1x4"}
    assert {name: runs for name, runs in _runs(result).items() if runs != "float"} == expected
    assert set(_runs(_lower(block="dense", sparsity=0.5)).values()) == {"native dense", "float"}


def test_observers_are_told_of_every_pass() -> None:
    events: list[PassEvent] = []
    _lower(sparsity=0.5, observers=[events.append])
    assert [event.name for event in events] == [
        *("weight-sparsification", "batchnorm-folding", "dead-code-elimination", "conv1x1-to-linear"),
        *("quantization", "block-sparse-int8-lowering"),
    ]


def test_weights_that_are_all_zero_are_lowered() -> None:
    model = _build()
    nn.init.zeros_(model.middle.weight)
    layer = _layers(_lower(model).module)["middle"]
    assert (len(layer.values), layer.sparsity) == (0, 1.0)
    assert _lower(model).module(IMAGE).isfinite().all()


def test_what_is_fastest_here_is_measured() -> None:
    result = _lower(backend="auto", sparsity=0.5)
    rows = {row.layer: row for row in result.report.lowering}
    assert not rows["stem"].microseconds
    for name in ("expand", "middle", "project", "fc"):
        row = rows[name]
        assert FLOAT in row.microseconds
        assert all(time > 0 for time in row.microseconds.values())
        assert row.runs == FLOAT or row.runs == min(row.microseconds.keys() - {FLOAT}, key=row.microseconds.__getitem__)
        assert (row.runs == FLOAT) == bool(row.reason)
    assert any(note.startswith("layers were measured on ") for note in result.report.notes)
    assert "float, µs" in result.report.lowered()


def test_depthwise_convolutions_are_lowered_between_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mobile().eval()
    result = _lower(model, sparsity=0.5, layers=["project", "expand", "depthwise"], exclude="depthwise")
    assert _runs(result) == {"expand": "native dense", "depthwise": "float", "project": "native 1x4"}
    result = _lower(model, sparsity={"project": 0.5})
    assert _runs(result) == {"expand": "native dense", "depthwise": "native", "project": "native 1x4"}
    assert result.report.lowering[1].shape == (2 * 3 * 3, 9, 16)
    loaded = fxprune.load(fxprune.save(result, tmp_path / "mobile", pt2=True), Mobile())
    _assert_same(loaded.module, result.module)
    assert loaded.plan == result.plan
    text = result.plan.to_json().replace('"depthwise": "native"', '"depthwise": "onednn dense"')
    with pytest.raises(PlanError, match="only 'native' computes 'depthwise', and it has 'onednn dense'"):
        fxprune.apply_plan(Mobile().eval(), IMAGE, Plan.from_json(text))
    program = torch.export.load(tmp_path / "mobile" / "model.pt2").module()
    assert torch.equal(program(IMAGE), result.module(IMAGE))
    timed = {row.layer: row.microseconds.keys() for row in _lower(model, backend="auto").report.lowering}
    assert timed["depthwise"] == {FLOAT, "native"}


def _clock(times: dict[str, dict[str, float]], entering: float = 1.0, leaving: float = 1.0) -> Any:
    """Return what measures as told, by layer."""

    def time(self: Stopwatch, node: fx.Node, layer: nn.Module, linear: nn.Module) -> LayerTimes:  # noqa: ARG001
        return LayerTimes(times[str(node.target)], entering, leaving)

    return time


_CHAIN = ("expand", "middle", "project")

FAST, SLOW = {FLOAT: 40.0, "native 1x4": 5.0, "onednn dense": 9.0}, {FLOAT: 5.0, "native 1x4": 20.0}


@pytest.mark.parametrize(
    ("times", "conversion", "expected"),
    [
        ({}, 1.0, {"expand": "native 1x4", "middle": "native 1x4", "project": "native 1x4", "fc": "native 1x4"}),
        ({"middle": SLOW}, 1.0, {"expand": "native 1x4", "middle": "float", "project": "native 1x4"}),
        ({"middle": SLOW}, 16.0, {"expand": "native 1x4", "middle": "native 1x4", "project": "native 1x4"}),
        ({"fc": {FLOAT: 6.0, "native dense": 5.5}}, 1.0, {"fc": "float", "expand": "native 1x4"}),
        ({"fc": {FLOAT: 6.0, "onednn dense": 4.5}}, 1.0, {"fc": "onednn dense", "expand": "native 1x4"}),
        ({name: {FLOAT: 9.0, "native 1x4": 8.0} for name in _CHAIN}, 4.0, dict.fromkeys(_CHAIN, "float")),
        ({"middle": {FLOAT: 5.0}}, 1.0, {"middle": "float", "expand": "native 1x4"}),
    ],
)
def test_conversions_count_in_what_is_fastest(
    monkeypatch: pytest.MonkeyPatch, times: dict[str, Any], conversion: float, expected: dict[str, str]
) -> None:
    known = dict.fromkeys(["expand", "middle", "project", "fc"], FAST) | times
    monkeypatch.setattr(Stopwatch, "time", _clock(known, conversion, conversion))
    result = _lower(backend="auto", sparsity=0.5)
    assert {name: runs for name, runs in _runs(result).items() if name in expected} == expected
    for row in result.report.lowering:
        if row.runs == FLOAT and row.layer != "stem":
            assert row.reason.startswith(("float is faster here: ", "no kernel for uint8 runs here"))


def test_a_model_that_is_faster_in_float_stays_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Stopwatch, "time", _clock(dict.fromkeys(["expand", "middle", "project", "fc"], SLOW)))
    result = _lower(backend="auto")
    assert set(_runs(result).values()) == {"float"}
    loaded = fxprune.load(fxprune.save(result, tmp_path / "float"), _build(7))
    _assert_same(loaded.module, result.module)


def test_an_artifact_gives_the_same_model_bit_for_bit(result: fxprune.Result, saved: Path) -> None:
    loaded = fxprune.load(saved, Net())
    assert fxprune.dump(loaded.module) == fxprune.dump(result.module)
    assert loaded.plan == result.plan
    assert _runs(loaded) == _runs(result)
    _assert_same(loaded.module, result.module)
    assert artifacts.read_report(saved) == result.report
    assert "BlockSparseInt8Linear(8→16, hardswish, 50.0% sparse in 1x4" in artifacts.read_diff(saved)
    state = result.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.module.state_dict().items())


def test_what_was_measured_is_loaded_as_it_was_chosen(tmp_path: Path) -> None:
    result = _lower(backend="auto", sparsity=0.5)
    loaded = fxprune.load(fxprune.save(result, tmp_path / "auto"), _build(7))
    assert _runs(loaded) == _runs(result)
    _assert_same(loaded.module, result.module)


def test_a_pruned_and_sparse_model_is_lowered_saved_and_loaded(tmp_path: Path) -> None:
    slim = fxprune.prune(_build(), IMAGE, ratio="25%", scope="uniform").module
    result = _lower(fxprune.sparsify(slim, IMAGE, sparsity=0.5).module)
    assert result.plan.spec.startswith("mask-insertion,channel-selection")
    assert result.plan.spec.endswith("quantization,block-sparse-int8-lowering")
    loaded = fxprune.load(fxprune.save(result, tmp_path / "slim"), _build(7))
    _assert_same(loaded.module, result.module)
    assert _layers(loaded.module)["middle"].in_features == 12


def test_a_plan_lowers_another_copy_of_the_model(result: fxprune.Result) -> None:
    plan = Plan.from_json(result.plan.to_json())
    assert plan == result.plan
    again = fxprune.apply_plan(_build(), IMAGE, plan)
    _assert_same(again.module, result.module)


def test_a_plan_does_not_lower_a_model_in_training_mode(result: fxprune.Result) -> None:
    with pytest.raises(InputError, match=r"lowering is for inference; call model\.eval"):
        fxprune.apply_plan(_build().train(), IMAGE, result.plan)


def test_a_plan_edited_by_hand_is_obeyed(result: fxprune.Result) -> None:
    planned = result.plan.lowering
    assert planned is not None
    text = result.plan.to_json().replace('"middle": "native 1x4"', '"middle": "onednn dense"')
    edited = Plan.from_json(text)
    assert _runs(fxprune.apply_plan(_build(), IMAGE, edited))["middle"] == "onednn dense"


def _planned(result: fxprune.Result, **changes: Any) -> Plan:
    planned = result.plan.lowering
    assert planned is not None
    return dataclasses.replace(result.plan, lowering=dataclasses.replace(planned, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": {"expand": "native 1x4"}}, "only in this model is 'fc' computed on integers"),
        ({"floating": {"gone": "it is not there"}}, "keep_float names 'gone'"),
        ({"floating": {"stem": "x", "fc": "x"}}, "only in it is 'fc' computed on integers"),
    ],
)
def test_a_plan_for_another_model_is_refused(result: fxprune.Result, changes: Any, message: str) -> None:
    with pytest.raises(PlanError, match=f"the plan is for another model: {message}.*; build the model as it was"):
        fxprune.apply_plan(_build(), IMAGE, _planned(result, **changes))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda model: nn.init.constant_(model.fc.weight, torch.inf), "not finite"),
        (lambda m: m.to("meta"), "on .* meta"),
    ],
)
def test_a_plan_says_why_a_layer_stays_in_float(spoil: Any, reason: str) -> None:
    model, plan = _build(), _lower().plan
    spoil(model)
    image = IMAGE.to(model.fc.weight.device)
    with pytest.raises(PlanError, match=rf"only in it is '\w+' .* \(its weight .*{reason}.*\); build"):
        fxprune.apply_plan(model, image, plan)


def test_a_backend_of_a_plan_that_does_not_exist_is_refused(result: fxprune.Result) -> None:
    assert result.plan.lowering is not None
    plan = _planned(result, layers=dict(result.plan.lowering.layers) | {"fc": "nativ 1x4"})
    with pytest.raises(PlanError, match="unknown backend 'nativ'; did you mean 'native'"):
        fxprune.apply_plan(_build(), IMAGE, plan)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"layers": ["fc"]}, "malformed"),
        ({"ranges": [{"value": "relu", "low": 1}]}, "is no range"),
        ({"ranges": [{"value": "relu", "low": 1, "high": 0}]}, "the lower one first"),
        ({"floating": None}, "malformed"),
        ({"im2col": "stem"}, "malformed: TypeError: 'im2col' is 'stem', and no list of paths"),
        ({"im2col": ["gone"]}, "for another model: no layer matches 'gone'"),
        ({"ranges": []}, "for another model"),
    ],
)
def test_a_damaged_plan_is_one_clear_error(saved: Path, damage: dict[str, Any], message: str) -> None:
    data = json.loads((saved / "plan.json").read_text())
    data["lowering"] |= damage
    (saved / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message):
        fxprune.load(saved, _build())


def test_weights_of_another_lowering_do_not_load(saved: Path, tmp_path: Path) -> None:
    other = fxprune.save(_lower(block="dense", sparsity="50%"), tmp_path / "other")
    (saved / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="does not fit the plan beside it"):
        fxprune.load(saved, _build())


def test_there_is_no_onnx_of_a_lowered_model(result: fxprune.Result, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"ONNX has no operators for layers that compute on integers.*model\.pt2"):
        fxprune.save(result, tmp_path / "lowered", onnx=True)
    assert not any(tmp_path.iterdir())


def test_an_exported_program_computes_the_same(result: fxprune.Result, tmp_path: Path) -> None:
    folder = fxprune.save(result, tmp_path / "lowered", pt2=True)
    program = torch.export.load(folder / "model.pt2").module()
    assert torch.equal(program(IMAGE), result.module(IMAGE))


def test_a_state_of_another_sparsity_loads(result: fxprune.Result, tmp_path: Path) -> None:
    other = _lower(_build(7), sparsity="75%").module
    other.load_state_dict(result.module.state_dict())
    third = _lower(_build(8), sparsity="50%").module
    save_model(result.module, str(tmp_path / "state.safetensors"))
    load_model(third, str(tmp_path / "state.safetensors"))
    state = result.module.state_dict()
    save_file(state, str(tmp_path / "plain.safetensors"))
    loaded = load_file(tmp_path / "plain.safetensors")
    for found in (other.state_dict(), third.state_dict(), loaded):
        assert found.keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in found.items())
    scales = {name: (layer.source, layer.target) for name, layer in _layers(other).items()}
    assert scales != {name: (layer.source, layer.target) for name, layer in _layers(result.module).items()}


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_computes_the_same_in_one_graph(result: fxprune.Result, compiler: str) -> None:
    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(result.module, fullgraph=True, backend=compiler)(IMAGE), result.module(IMAGE))


def test_a_copy_computes_the_same_and_stands_alone(result: fxprune.Result) -> None:
    expected = result.module(IMAGE)
    copied = copy.deepcopy(result.module)
    _assert_same(copied, result.module)
    for layer in _layers(copied).values():
        layer.values.zero_()
        layer.multiplier.zero_()
    assert torch.equal(result.module(IMAGE), expected)
    assert not torch.equal(copied(IMAGE), expected)


def _call(module: nn.Module, x: Tensor, connection: Any) -> None:
    connection.send((module(x).detach().tolist(), [str(layer) for layer in _layers(module).values()]))


def test_a_process_that_is_started_anew_computes_the_same(result: fxprune.Result) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_call, args=(result.module, IMAGE, theirs))
    process.start()
    theirs.close()
    found, layers = ours.recv()
    process.join()
    assert found == result.module(IMAGE).tolist()
    assert layers == [str(layer) for layer in _layers(result.module).values()]


def test_threads_that_call_one_module_at_once_get_the_same(result: fxprune.Result) -> None:
    inputs = [torch.rand(1 + i % 3, 3, 5 + i, 6, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    fresh, found = copy.deepcopy(result.module), {}
    start = threading.Barrier(4)

    def work(first: int) -> None:
        start.wait()
        for i in range(first, len(inputs), 4):
            found[i] = fresh(inputs[i])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], result.module(x)) for i, x in enumerate(inputs))


def _no_batches() -> Iterator[Tensor]:
    yield from ()


def _normed() -> nn.Module:
    model = _build()
    parametrizations.weight_norm(model.middle)
    return model


def _thresholded() -> nn.Module:
    model = _build()
    attach_thresholds(model, [("fc", "weight")], 1e-3, False)
    return model


BAD_INPUT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"calibration": None}, InputError, r"give calibration=batches, .*calibration=\[example_inputs\] does"),
    ({"calibration": IMAGE}, InputError, r"calibration is one Tensor; give several batches, or \[batch\]"),
    ({"calibration": fxprune.Inputs((IMAGE,))}, InputError, "calibration is one Inputs"),
    ({"calibration": lambda: [IMAGE]}, InputError, "calibration is a function; give batches: a list, a generator"),
    ({"calibration": [None]}, InputError, "batch 0 of the calibration: example inputs of type NoneType; give a tensor"),
    ({"calibration": [IMAGE, ()]}, InputError, "batch 1 of the calibration: the example inputs do not fit the model"),
    ({"calibration": [IMAGE[:0]]}, InputError, "batch 0 of the calibration holds no values; leave it out"),
    ({"calibration": []}, InputError, "no batch was given to calibrate on"),
    ({"calibration": _no_batches()}, InputError, "no batch was given to calibrate on"),
    ({"calibration": [IMAGE, IMAGE * torch.nan]}, InputError, "batch 1 of the calibration holds NaN"),
    ({"calibration": [IMAGE / 0]}, InputError, "batch 0 of the calibration holds NaN or infinity"),
    ({"calibration": [torch.rand(1, 4, 6, 6)]}, InputError, r"batch 0 of the calibration, .* does not run"),
    ({"observer": "median"}, SpecError, "unknown observer 'median'"),
    ({"backend": "onednm"}, SpecError, "did you mean 'onednn'"),
    ({"backend": {"middel": "native"}}, SpecError, "did you mean 'middle'"),
    ({"backend": {"stem": "native"}}, SpecError, "'stem' is no quantised layer"),
    ({"block": "four"}, SpecError, "cannot read the block 'four'"),
    ({"im2col": "stm"}, SpecError, "no layer matches 'stm'; did you mean 'stem'"),
    ({"layers": "middel"}, SpecError, "matches 'middel'|middle"),
    ({"exclude": ["all"]}, InputError, "no layer of the model can be computed on integers: 'expand': it was excluded"),
    ({"sparsity": 2}, TargetError, "outside"),
    ({"sparsity": {"middle": 0.5}, "layers": "fc", "exclude": "gone"}, SpecError, "gone"),
    ({"frontend": "export"}, InputError, r"on integers: its graph calls no .* \(front end 'export', .*='symbolic'\)"),
    ({"model": nn.ReLU().eval()}, InputError, r"its graph calls no linear layer or .* \(front end 'symbolic'\)"),
    ({"model": _build().train()}, InputError, "training mode, and lowering is for inference; call model.eval"),
    ({"model": _build().double()}, InputError, "its weight is float64, and only float32 is quantised|dtype|double"),
    ({"model": _normed()}, InputError, r"the weight of 'middle' is computed by _WeightNorm; bake it in with torch\."),
    ({"model": _thresholded()}, InputError, "the weight of 'fc' is computed by "),
    ({"model": nn.Sequential(nn.Conv2d(3, 4, 3)).eval()}, InputError, "no layer .*: '0': no rule says how a Conv2d"),
]


@pytest.mark.parametrize(("how", "kind", "message"), BAD_INPUT, ids=[message for *_, message in BAD_INPUT])
def test_bad_input(how: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        _lower(**how)


def _scaled(_layer: nn.Module, _given: Any, found: Tensor) -> Tensor:
    return found * torch.linspace(1, 3, found.shape[1]).view(-1, *[1] * (found.dim() - 2))


def _hooked(position: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Identity(), nn.Conv2d(8, 8, 1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    model[position].register_forward_hook(_scaled)
    return model


@pytest.mark.parametrize("position", range(8))
def test_hooks_run_on(position: int) -> None:
    model = _hooked(position)
    result = _lower(model)
    expected = model(IMAGE)
    assert (result.module(IMAGE) - expected).abs().max() < 0.1 * expected.abs().max()
    assert "float" not in {runs for layer, runs in _runs(result).items() if layer != str(position)}
    reasons = {row.layer: row.reason for row in result.report.lowering}
    assert reasons.get(str(position), "hooks take part in what it computes") == "hooks take part in what it computes"


def test_a_computed_weight_may_be_excluded() -> None:
    assert _runs(_lower(_normed(), exclude="middle"))["middle"] == "float"


@pytest.mark.parametrize("job", [_lower, lambda model: fxprune.prune(model, IMAGE, macs="50%"), fxprune.trace])
def test_lowering_twice_is_refused_and_so_is_what_needs_floats(result: fxprune.Result, job: Any) -> None:
    arguments = (IMAGE,) if job is fxprune.trace else ()
    with pytest.raises(InputError, match=r"is lowered already: 'expand'|module 'expand' is quantised"):
        job(result.module, *arguments)


def test_a_model_elsewhere_is_not_measured() -> None:
    with pytest.raises(InputError, match=r"the model is on meta, and kernels are chosen for CPUs; call model\.cpu"):
        _lower(_build().to("meta"), backend="auto")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_weights_stay_in_float() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.none, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 0), nn.Linear(0, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.none(self.conv(x).mean((2, 3))))

    result = _lower(Empty().eval())
    assert _runs(result) == {"conv": "native dense", "none": "float", "fc": "float"}
    assert [row.shape for row in result.report.lowering][1:] == [(0, 0, 0), (2, 0, 2)]


def test_zero_ranges_are_ranges() -> None:
    model = _build()
    nn.init.zeros_(model.expand.weight)
    nn.init.zeros_(model.expand.bias)  # type: ignore[arg-type]
    result = _lower(model)
    assert result.plan.lowering is not None
    assert result.plan.lowering.ranges.by_name["expand"] == Range(0.0, 0.0)
    assert result.module(IMAGE).isfinite().all()
