"""Records round-trip, and what is wrong with a folder is one clear error that costs nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune import artifacts
from fxprune.errors import ArtifactError, PlanError, UsageError
from fxprune.graph.dump import dump
from fxprune.plan import SCHEMA, Plan, PlannedOrbit


class Tied(nn.Module):
    """Two layers that share one weight, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Conv2d(8, 8, 1)
        self.second = nn.Conv2d(8, 8, 1)
        self.second.weight = self.first.weight
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return {"scores": self.fc(x.mean((2, 3)))}


class TwoInputs(nn.Module):
    """A tensor, keyword tensors in a list, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 12)
        self.right = nn.Linear(5, 12)
        self.last = nn.Linear(12, 2)

    def forward(self, a: Tensor, *, others: list[Tensor], scale: float = 1.0) -> Tensor:
        return self.last(torch.relu(self.left(a) + scale * self.right(others[0])))


IMAGE = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def _build(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    model = Tied().eval()
    nn.init.uniform_(model.norm.running_mean)  # type: ignore[arg-type]
    return model


@pytest.fixture
def result() -> fxprune.Result:
    return fxprune.prune(_build(), IMAGE, macs="50%")


@pytest.fixture
def saved(result: fxprune.Result, tmp_path: Path) -> Path:
    return fxprune.save(result, tmp_path / "slim")


def _assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_a_plan_survives_json(result: fxprune.Result) -> None:
    assert Plan.from_json(result.plan.to_json()) == result.plan
    assert json.loads(result.plan.to_json())["schema"] == SCHEMA


def test_a_report_survives_json(result: fxprune.Result) -> None:
    report = dataclasses.replace(result, latency_ms=(2.5, 1.25), notes=("a note",)).report
    assert report.notes == ("a note",)
    assert "latency, ms" in report.totals()
    assert fxprune.Report.from_json(report.json()) == report


def test_an_artifact_gives_the_same_model_bit_for_bit(result: fxprune.Result, saved: Path) -> None:
    loaded = fxprune.load(saved, _build(seed=7))
    assert dump(loaded.module) == dump(result.module)
    assert loaded.plan == dataclasses.replace(result.plan, versions=loaded.plan.versions)
    _assert_same(loaded.module(IMAGE), result.module(IMAGE))
    for name, value in result.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], value), name


def test_the_folder_holds_the_report_and_the_changes(result: fxprune.Result, saved: Path) -> None:
    assert artifacts.read_report(saved) == result.report
    assert artifacts.read_diff(saved).rstrip("\n") == result.changes
    assert sorted(path.name for path in saved.iterdir()) == [
        "graph.diff",
        "inputs.json",
        "model.safetensors",
        "plan.json",
        "report.json",
    ]


def test_a_tie_survives(result: fxprune.Result, saved: Path) -> None:
    for module in (result.module, fxprune.load(saved, _build()).module):
        assert module.get_parameter("first.weight") is module.get_parameter("second.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_survives(dtype: torch.dtype, tmp_path: Path) -> None:
    result = fxprune.prune(_build().to(dtype), IMAGE.to(dtype), macs="50%")
    loaded = fxprune.load(fxprune.save(result, tmp_path / "slim"), _build(seed=7).to(dtype))
    assert {value.dtype for value in loaded.module.parameters()} == {dtype}
    _assert_same(loaded.module(IMAGE.to(dtype)), result.module(IMAGE.to(dtype)))


def test_training_mode_survives(tmp_path: Path) -> None:
    result = fxprune.prune(_build().train(), IMAGE, macs="50%")
    loaded = fxprune.load(fxprune.save(result, tmp_path / "slim"), _build(seed=7).train())
    assert loaded.module.training
    _assert_same(loaded.module.eval()(IMAGE), result.module.eval()(IMAGE))


def test_loading_leaves_the_model_that_it_is_given_alone(saved: Path) -> None:
    model = _build(seed=7).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fxprune.load(saved, model)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_plan_is_applied_to_a_model_with_other_weights(result: fxprune.Result) -> None:
    again = fxprune.apply_plan(_build(seed=7), IMAGE, Plan.from_json(result.plan.to_json()))
    shapes = {name: value.shape for name, value in result.module.state_dict().items()}
    assert {name: value.shape for name, value in again.module.state_dict().items()} == shapes


def test_a_plan_edited_by_hand_is_obeyed(saved: Path) -> None:
    plan = artifacts.read_plan_file(saved)
    first = plan.orbits[0]
    assert first.places[0] == "stem.weight[0]"
    edited = dataclasses.replace(plan, orbits=(dataclasses.replace(first, kept=(2, 5)), *plan.orbits[1:]))
    slim = fxprune.apply_plan(_build(), IMAGE, Plan.from_json(edited.to_json())).module
    assert torch.equal(slim.get_parameter("stem.weight"), _build().stem.weight[[2, 5]])


def test_several_inputs_survive(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoInputs().eval()
    inputs = fxprune.Inputs((torch.rand(3, 6),), {"others": [torch.rand(3, 5)], "scale": 0.5})
    result = fxprune.prune(model, inputs, ratio=0.5)
    loaded = fxprune.load(fxprune.save(result, tmp_path / "slim"), TwoInputs().eval())
    assert loaded.inputs.kwargs["scale"] == 0.5
    assert loaded.module.get_parameter("left.weight").shape == result.module.get_parameter("left.weight").shape
    arguments = (torch.rand(3, 6), [torch.rand(3, 5)])
    found, expected = (m(arguments[0], others=arguments[1]) for m in (loaded.module, result.module))
    _assert_same(found, expected)


def test_an_exported_program_computes_the_same(result: fxprune.Result, tmp_path: Path) -> None:
    folder = fxprune.save(result, tmp_path / "slim", pt2=True)
    program = torch.export.load(folder / "model.pt2").module()
    torch.testing.assert_close(program(IMAGE), result.module(IMAGE))


def test_an_onnx_model_computes_the_same(result: fxprune.Result, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    folder = fxprune.save(result, tmp_path / "slim", onnx=True)
    session = runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), result.module(IMAGE)["scores"], rtol=1e-4, atol=1e-5)


def test_a_relative_folder_and_new_parents_are_made(
    result: fxprune.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fxprune.save(result, "a/b/slim")
    assert (tmp_path / "a" / "b" / "slim" / "plan.json").is_file()


def test_an_empty_folder_is_filled(result: fxprune.Result, tmp_path: Path) -> None:
    (tmp_path / "slim").mkdir()
    assert (fxprune.save(result, tmp_path / "slim") / "plan.json").is_file()


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def test_nothing_is_overwritten(result: fxprune.Result, saved: Path) -> None:
    before = _tree(saved.parent)
    with pytest.raises(ArtifactError, match="is not empty; give a new folder"):
        fxprune.save(result, saved)
    assert _tree(saved.parent) == before


def test_a_file_is_no_folder(result: fxprune.Result, tmp_path: Path) -> None:
    (tmp_path / "slim").write_text("mine")
    for path in (tmp_path / "slim", tmp_path / "slim" / "below"):
        with pytest.raises(ArtifactError):
            fxprune.save(result, path)
    assert _tree(tmp_path) == {"slim": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission(result: fxprune.Result, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match="choose a folder you may write"):
        fxprune.save(result, tmp_path / "slim")


def _refuse(*_: Any, **__: Any) -> Any:
    raise PermissionError(13, "Permission denied")


def test_a_folder_that_cannot_be_made(result: fxprune.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", _refuse)
    with pytest.raises(ArtifactError, match="Permission denied; choose a folder you may write"):
        fxprune.save(result, tmp_path / "slim")
    assert _tree(tmp_path) == {}


@pytest.mark.parametrize(
    "failing", ["model.safetensors", "plan.json", "report.json", "inputs.json", "graph.diff", "rename"]
)
def test_a_disk_that_fills_up_leaves_nothing_half_written(
    result: fxprune.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    def failing_as_safetensors_does(*_: Any, **__: Any) -> Any:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    original = Path.write_text

    def write(self: Path, *args: Any, **options: Any) -> int:
        return full() if self.name == failing else original(self, *args, **options)

    if failing == "model.safetensors":
        monkeypatch.setattr(artifacts, "save_model", failing_as_safetensors_does)
    elif failing == "rename":
        monkeypatch.setattr(Path, "rename", full)
    else:
        monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(ArtifactError, match="No space left on device"):
        fxprune.save(result, tmp_path / "slim")
    assert _tree(tmp_path) == {}


@pytest.mark.parametrize("option", ["pt2", "onnx"])
def test_an_export_that_fails_leaves_nothing_half_written(
    result: fxprune.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("this operator has no export")

    monkeypatch.setattr(torch.export, "export", broken)
    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(ArtifactError, match="this operator has no export"):
        fxprune.save(result, tmp_path / "slim", **{option: True})  # type: ignore[arg-type]
    assert _tree(tmp_path) == {}


def test_onnx_without_its_extra_says_how_to_get_it(
    result: fxprune.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ArtifactError, match=r"pip install 'fxprune\[export\]'"):
        fxprune.save(result, tmp_path / "slim", onnx=True)
    assert _tree(tmp_path) == {}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _set(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _remove(path: Path) -> None:
    path.unlink()


def _write(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text)

    return write


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("plan.json", _remove, "has no plan.json; is it a folder that fxprune saved"),
        ("plan.json", _truncate, "not valid JSON .* may be truncated"),
        ("plan.json", _write("[1, 2]"), "not a plan of fxprune"),
        ("plan.json", _write('{"name": "a package"}'), "not a plan of fxprune"),
        ("plan.json", _write("\x00\x01"), "not valid JSON"),
        ("plan.json", _set(schema=SCHEMA + 1), f"schema {SCHEMA + 1}, newer than {SCHEMA} .* upgrade fxprune"),
        ("plan.json", _set(schema="1"), "not a plan of fxprune"),
        ("plan.json", _set(schema=0), "schema 0"),
        ("plan.json", _set(orbits=[{"name": "orbit_0"}]), "malformed: KeyError"),
        ("plan.json", _set(orbits=[]), "for another model: it says nothing of orbit_0"),
        (
            "plan.json",
            _set(orbits=[{"name": "orbit_0", "width": 4, "kept": [4], "places": ["stem.weight[0]"]}]),
            "'kept' of orbit_0 must be distinct classes in 0 … 3",
        ),
        (
            "plan.json",
            _set(orbits=[{"name": "orbit_0", "width": 4, "kept": [], "places": ["stem.weight[0]"]}]),
            "at least one",
        ),
        (
            "plan.json",
            _set(orbits=[{"name": "orbit_0", "width": 4, "kept": [1], "places": []}]),
            "orbit_0",
        ),
        ("plan.json", _set(frontend="guess"), "front end 'guess'"),
        ("inputs.json", _remove, "has no inputs.json"),
        ("inputs.json", _truncate, "inputs.json' cannot be read"),
        ("inputs.json", _write('{"args": [{"tensor": [1], "dtype": "nn"}], "kwargs": {}}'), "cannot be read"),
        ("model.safetensors", _remove, "has no model.safetensors"),
        ("model.safetensors", _truncate, "does not fit the plan beside it, or is truncated"),
        ("model.safetensors", _write("garbage"), "does not fit the plan beside it, or is truncated"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(
    saved: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(saved / name)
    before = _tree(saved)
    with pytest.raises(UsageError, match=message) as caught:
        fxprune.load(saved, _build(seed=7))
    assert "\n" not in str(caught.value)
    assert _tree(saved) == before


@pytest.mark.parametrize("damage", [_remove, _truncate, _write("{}"), _write("[]")])
def test_a_damaged_report_is_one_clear_error(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved / "report.json")
    with pytest.raises(ArtifactError, match=r"report\.json"):
        artifacts.read_report(saved)


def test_weights_of_another_plan_do_not_load(saved: Path, tmp_path: Path) -> None:
    other = fxprune.save(fxprune.prune(_build(), IMAGE, macs="80%"), tmp_path / "other")
    (saved / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="does not fit the plan beside it"):
        fxprune.load(saved, _build())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no plan\.json"):
        fxprune.load(tmp_path / "nothing", _build())


def _wider() -> nn.Module:
    model = _build()
    model.stem, model.norm, model.first = nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.Conv2d(9, 8, 1)
    return model.eval()


@pytest.mark.parametrize("make", [_wider, lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).eval()])
def test_a_plan_for_another_model_is_refused(saved: Path, make: Callable[[], nn.Module]) -> None:
    with pytest.raises(PlanError, match="the plan is for another model"):
        fxprune.load(saved, make())


def test_what_was_cut_twice_loads_into_what_was_cut_once(result: fxprune.Result, saved: Path, tmp_path: Path) -> None:
    twice = fxprune.sparsify(fxprune.prune(result.module, IMAGE, ratio=0.3).module, IMAGE, sparsity=0.5, block="1x1")
    assert (twice.plan.model, twice.plan.given) == ("Tied", result.plan.spec)
    fxprune.save(twice, tmp_path / "twice")
    with pytest.raises(PlanError, match=r"made of a model that had been cut before: give .* \(mask-insertion,channel-"):
        fxprune.load(tmp_path / "twice", _build())
    loaded = fxprune.load(tmp_path / "twice", fxprune.load(saved, _build(1)).module)
    _assert_same(loaded.module(IMAGE), twice.module(IMAGE))
    assert loaded.plan.given == twice.plan.given


def test_a_plan_refused_by_name_says_what_was_found() -> None:
    plan = Plan((PlannedOrbit("orbit_0", 8, (0, 1), ("elsewhere.weight[0]",)),))
    with pytest.raises(PlanError, match=r"orbit_0 of width 8 at elsewhere\.weight\[0\], this model has no such orbit"):
        fxprune.apply_plan(_build(), IMAGE, plan)


def test_inputs_that_json_cannot_say_are_refused_before_anything_is_written(
    result: fxprune.Result, tmp_path: Path
) -> None:
    odd = dataclasses.replace(result, inputs=fxprune.Inputs((IMAGE, object())))
    with pytest.raises(ArtifactError, match="cannot be described in JSON"):
        fxprune.save(odd, tmp_path / "slim")
    assert _tree(tmp_path) == {}
