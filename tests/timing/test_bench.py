"""Variants are compared with the model, timed in turn, and put back what they changed; mistakes are named."""

from __future__ import annotations

import builtins
import copy
import json
import math
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError, SpecError, TargetError, UsageError
from fxprune.runtime.int8 import Int8Linear
from fxprune.timing import engines, variants
from fxprune.timing.comparison import VariantTimes
from fxprune.timing.variants import VARIANTS
from tests.timing.nets import IMAGE, Clock, Named, net

QUICK = {"runs": 2, "warmup": 0}


@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_a_variant_computes_what_the_model_does(name: str) -> None:
    pytest.importorskip("torch" if name == "eager" else name)
    row = fxprune.bench(net(), IMAGE, name, layers=False, **QUICK)[name]
    assert row.reason == ""
    assert row.times is not None
    assert len(row.times.milliseconds) == 2
    assert row.agreement is not None
    assert row.agreement.difference < 1e-5
    assert row.agreement.cosine > 0.99999


def test_compiled_code_is_new_for_every_model() -> None:
    for seed in (1, 2):
        model = nn.Linear(4, 4)
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(seed))
        row = fxprune.bench(model, torch.rand(2, 4), "compiled", **QUICK)["compiled"]
        assert row.reason == ""
        assert row.agreement is not None
        assert row.agreement.difference < 1e-5
        assert row.remark == "weights frozen, 1 graph"


def test_a_compiler_that_compiles_nothing_is_no_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module: module)
    row = fxprune.bench(net(), IMAGE, "compiled", **QUICK)["compiled"]
    assert row.times is None
    assert "compiled nothing" in row.reason


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_take_inputs_by_name(name: str) -> None:
    pytest.importorskip(name)
    inputs = {"b": torch.rand(2, 4), "scale": 3.0, "a": torch.rand(2, 4)}
    row = fxprune.bench(Named(), inputs, name, layers=False, **QUICK)[name]
    assert row.reason == ""
    assert row.agreement is not None
    assert row.agreement.difference < 1e-5


def test_onnx_runtime_computes_on_the_given_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("onnxruntime")
    real, sessions = runtime.InferenceSession, []

    def spy(*args: Any, **kwargs: Any) -> Any:
        sessions.append(real(*args, **kwargs))
        return sessions[-1]

    monkeypatch.setattr(runtime, "InferenceSession", spy)
    fxprune.bench(nn.Linear(4, 2), torch.rand(1, 4), "onnxruntime", threads=3, **QUICK)
    assert [session.get_session_options().intra_op_num_threads for session in sessions] == [3]


def test_openvino_computes_on_the_given_threads_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("openvino")
    threads: list[int] = []
    precisions: list[str] = []

    class Spy(runtime.Core):
        def compile_model(self, model: Any, device: str, options: dict[str, Any]) -> Any:
            compiled = super().compile_model(model, device, options)
            threads.append(options["INFERENCE_NUM_THREADS"])
            precisions.append(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
            return compiled

    monkeypatch.setattr(runtime, "Core", Spy)
    fxprune.bench(nn.Linear(4, 2), torch.rand(1, 4), "openvino", threads=3, **QUICK)
    assert (threads, precisions) == ([3], ["f32"])


class _Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_what_onnx_cannot_say_is_in_the_row(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    found = fxprune.bench(_Loop(), torch.rand(3), ["eager", "onnxruntime"], layers=False, **QUICK)
    assert "data-dependent" in found["onnxruntime"].reason
    assert found["eager"].times is not None
    assert "def forward" not in capfd.readouterr().err


@pytest.mark.parametrize(("name", "extra"), [("onnxruntime", "export"), ("openvino", "openvino")])
def test_a_missing_extra_is_named_in_the_row(monkeypatch: pytest.MonkeyPatch, name: str, extra: str) -> None:
    real = builtins.__import__

    def without(wanted: str, *args: Any, **kwargs: Any) -> Any:
        if wanted == name:
            raise ImportError(wanted)
        return real(wanted, *args, **kwargs)

    monkeypatch.setattr(engines.importlib, "import_module", without)
    found = fxprune.bench(net(), IMAGE, ["eager", name], **QUICK)
    assert found["eager"].times is not None
    assert found[name].times is None
    assert found[name].reason == f"it needs the extra: pip install 'fxprune[{extra}]'"
    assert found[name].reason in found.table()


def test_a_model_is_lowered_to_every_sparsity() -> None:
    batches = (torch.rand_like(IMAGE) for _ in range(2))
    found = fxprune.bench(net(), IMAGE, ["eager", "lowered"], sparsity=["60%", 0], calibration=batches, **QUICK)
    assert [row.variant for row in found.variants] == ["eager", "lowered 60%", "lowered 0%"]
    assert all(row.times is not None and not row.reason for row in found.variants)
    assert [times.variant for times in found.layers] == ["eager", "lowered 60%", "lowered 0%"]


def test_a_model_that_cannot_be_lowered_has_the_reason_in_its_row() -> None:
    found = fxprune.bench(nn.Sequential(nn.Conv2d(3, 4, 3)), IMAGE, ["eager", "lowered"], **QUICK)
    assert found["eager"].times is not None
    assert "no rule says how a Conv2d computes on uint8" in found["lowered"].reason
    found = fxprune.bench(nn.Sequential(nn.Conv2d(3, 4, 3)), IMAGE, ["eager", "lowered"], im2col="0", **QUICK)
    assert found["lowered"].times is not None


def _forward(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x: change(model(x))


def test_modules_made_elsewhere_are_rows_behind_the_others() -> None:
    model = net()
    others = {"lowered": fxprune.trace(model, IMAGE), "twice": _forward(model, lambda y: 2 * y)}
    found = fxprune.bench(model, IMAGE, ["lowered", "eager"], modules=others, **QUICK)
    assert [row.variant for row in found.variants] == ["lowered", "eager", "twice"]
    differences = {row.variant: row.agreement.difference for row in found.variants if row.agreement}
    assert differences["lowered"] < 1e-5
    assert differences["twice"] == pytest.approx(1, rel=1e-3)
    assert [times.variant for times in found.layers] == ["lowered", "eager"]


def test_lowered_layers_count_in_their_graph_and_in_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Int8Linear, "__init__", nn.Module.__init__)
    monkeypatch.setattr(Int8Linear, "forward", lambda self, x: self.layer(x))
    model = net()
    lowered = fxprune.trace(copy.deepcopy(model), IMAGE)
    layer = Int8Linear()  # type: ignore[call-arg]
    layer.layer = lowered.get_submodule("5")
    lowered.set_submodule("5", layer)
    found = fxprune.bench(model, IMAGE, "eager", modules={"lowered": lowered}, **QUICK)
    for times in found.layers:
        assert [x.layer for x in times.layers if x.is_lowered] == ["5"]
        assert 0 < times.lowered < times.total
    assert "Layers that lowering touched take " in found.table()
    assert [x.kind for x in found.layers[1].layers][-1] == "Int8Linear"


def test_variants_run_in_turn_each_settling_first() -> None:
    calls: list[str] = []

    def spy(name: str) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            assert torch.get_num_threads() == 2
            calls.append(name)
            return x

        return call

    modules = {"a": spy("a"), "b": spy("b")}
    before = torch.get_num_threads()
    fxprune.bench(nn.Identity(), torch.rand(3), (), modules=modules, runs=2, warmup=1, threads=2)
    assert torch.get_num_threads() == before
    assert calls[:2] == ["a", "b"], "one run each to compare the outputs"
    assert calls[2:] == ["a", "b", *["a", "a", "b", "b"] * 2]


def test_medians_quartiles_and_speed_ups_are_of_the_timed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    # Each by one run to compare, one to settle before each of the four timed ones.
    taken = {"slow": iter([9, 9, 4, 9, 6, 9, 8, 9, 2]), "fast": iter([9, 9, 1, 9, 1, 9, 1, 9, 1])}

    def module(name: str) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            clock.spend(next(taken[name]))
            return x

        return call

    modules = {"eager": module("slow"), "fast": module("fast")}
    found = fxprune.bench(nn.Identity(), torch.rand(3), (), modules=modules, runs=4, warmup=0, layers=False)
    slow = found["eager"].times
    assert slow is not None
    assert slow.milliseconds == pytest.approx((4, 6, 8, 2))
    assert (slow.median, slow.quartiles) == (pytest.approx(5), pytest.approx((3.5, 6.5)))
    assert found.speedup(found["fast"]) == pytest.approx(5)
    assert "5.00×" in found.table()
    assert "3.500 to 6.500" in found.table()
    assert any("quartiles far apart: 'eager' (60%)" in note for note in found.notes)


def test_each_variant_keeps_its_faster_memory_format(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def call(x: Tensor) -> Tensor:
        clock.spend(1 if x.is_contiguous(memory_format=torch.channels_last) else 2)
        return x

    def measured(**options: Any) -> VariantTimes:
        found = fxprune.bench(nn.Identity(), IMAGE, (), modules={"a": call}, layers=False, **QUICK, **options)
        return found["a"]

    rows = {wanted: measured(memory_format=wanted) for wanted in ("auto", "contiguous", "channels-last")}
    assert {wanted: row.memory_format for wanted, row in rows.items()} == {
        "auto": "channels-last",
        "contiguous": "contiguous",
        "channels-last": "channels-last",
    }
    assert {wanted: row.times.median for wanted, row in rows.items() if row.times} == pytest.approx(
        {"auto": 1, "contiguous": 2, "channels-last": 1}
    )


class Viewing(nn.Module):
    """Takes contiguous images only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1)


def test_a_model_that_takes_one_memory_format_is_run_in_it() -> None:
    row = fxprune.bench(Viewing(), IMAGE, "eager", **QUICK)["eager"]
    assert (row.memory_format, row.reason) == ("contiguous", "")
    row = fxprune.bench(Viewing(), IMAGE, "eager", memory_format="channels-last", **QUICK)["eager"]
    assert "RuntimeError" in row.reason
    assert row.times is None


def test_a_float_variant_that_computes_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> variants.Call:
        return variants.Call(lambda: torch.zeros(1, 5))

    broken = variants.Variant("onnxruntime", wrong, None)
    monkeypatch.setitem(variants.VARIANTS, "onnxruntime", broken)
    found = fxprune.bench(net(), IMAGE, "onnxruntime", **QUICK)
    assert "'onnxruntime' computes something else than the model: outputs differ by 100.0%" in found.notes


def test_time_that_others_had_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def call(x: Tensor) -> Tensor:
        clock.spend(3)
        clock.spend(1, stolen=True)
        return x

    found = fxprune.bench(nn.Identity(), torch.rand(3), (), modules={"a": call}, **QUICK)
    assert "other processes had the processor 25% of the time: these times are too long" in found.notes


def test_the_model_stays_as_it_is() -> None:
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    fxprune.bench(model, IMAGE, "eager", **QUICK)
    assert all(part.training for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_json_says_what_the_table_does() -> None:
    modules = {"not finite": lambda _: torch.full((1,), 5.0)}
    found = fxprune.bench(_Zero(), IMAGE, ["eager", "lowered"], modules=modules, name="mine", **QUICK)
    facts = json.loads(found.json(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    eager, lowered, other = facts["variants"]
    assert (facts["model"], facts["threads"], facts["runs"]) == ("mine", torch.get_num_threads(), 2)
    assert facts["machine"]["versions"]["torch"] == version("torch")
    assert eager["median_ms"] == pytest.approx(sum(eager["times"]["milliseconds"]) / 2)
    assert eager["speedup"] == 1
    assert eager["memory_format"] in ("contiguous", "channels-last")
    assert (lowered["median_ms"], lowered["times"]) == (None, None)
    assert lowered["reason"]
    assert other["agreement"]["difference"] is None
    assert facts["layers"][0]["lowered_share"] == 0
    assert sum(row["share"] for row in facts["layers"][0]["layers"]) == pytest.approx(1)


class _Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum().view(1) * 0


def test_outputs_that_are_not_finite_are_noted() -> None:
    found = fxprune.bench(nn.Identity(), torch.tensor([math.inf, 1.0]), "eager", **QUICK)
    assert "the eager model's outputs are not all finite; only the others are compared" in found.notes


def test_more_threads_than_cores_are_noted() -> None:
    found = fxprune.bench(nn.Identity(), torch.rand(2), "eager", threads=1000, **QUICK)
    assert any(note.startswith("1000 threads share ") for note in found.notes)


class _Elsewhere(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.rand(7, 7))


class _Telling(nn.Module):
    def forward(self, x: Tensor) -> str:
        return str(x.shape)


@pytest.mark.parametrize(
    ("model", "options", "kind", "message"),
    [
        (net(), {"variants": "lowerd"}, SpecError, "unknown variant 'lowerd'; did you mean 'lowered'?"),
        (net(), {"variants": ["zzz"]}, SpecError, "unknown variant 'zzz'; known: eager, compiled, onnxruntime,"),
        (net(), {"variants": ()}, SpecError, "no variant to measure; give some of: eager, "),
        (net(), {"variants": "eager", "sparsity": 0.5}, SpecError, "not among those to make: eager"),
        (net(), {"sparsity": 0.5, "modules": {"lowered": net()}}, SpecError, "not among those to make"),
        (net(), {"sparsity": [0.5, "50%"]}, SpecError, "two rows are called 'lowered 50%'"),
        (net(), {"sparsity": "100%"}, TargetError, "sparsity=100% is outside"),
        (net(), {"memory_format": "channels_last"}, SpecError, "did you mean 'channels-last'?"),
        (net(), {"runs": 0}, InputError, "give at least 1"),
        (net(), {"warmup": -1}, InputError, "give 0 or more"),
        (net(), {"threads": 0}, InputError, "on 0 threads; give at least 1"),
        (_Elsewhere(), {}, InputError, "does not run on the example inputs: RuntimeError"),
        (Named(), {}, InputError, "do not fit the model: missing a required"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    model: nn.Module, options: dict[str, Any], kind: type[UsageError], message: str
) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(kind) as raised:
        fxprune.bench(model, IMAGE, **options)
    assert message in str(raised.value)
    assert torch.get_num_threads() == threads


def test_inputs_without_images_cannot_lie_channels_last() -> None:
    with pytest.raises(InputError, match="no example input has four dimensions"):
        fxprune.bench(nn.Identity(), torch.rand(3), "eager", memory_format="channels-last")


def test_a_model_without_tensors_to_compare_is_refused() -> None:
    with pytest.raises(InputError, match="outputs hold no tensor"):
        fxprune.bench(_Telling(), torch.rand(3), "eager")


def test_every_variant_can_be_asked_for() -> None:
    found = fxprune.bench(nn.Identity(), torch.rand(3), "lowered", **QUICK)
    assert found["lowered"].reason
    with pytest.raises(SpecError, match=", ".join([*VARIANTS, "lowered"])):
        fxprune.bench(nn.Identity(), torch.rand(3), ())
