"""Every command: what it prints, what it writes, and its exit code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fxprune
from fxprune import api, artifacts
from fxprune.cli import sensitivity as sensitivity_command
from fxprune.console import Progress
from fxprune.errors import VerifyError
from fxprune.labels.operators import NOTES
from fxprune.labels.rules import FAMILIES, RULES
from fxprune.runtime.weight_masks import masked_weights
from fxprune.zoo import ModelSource, build_model
from passes import PASSES
from tests.commands import call as _call
from tests.commands import done as _done
from tests.commands import mistake as _mistake

SMALL = ("torchvision:squeezenet1_1", "--input", "1x3x64x64")

MODELS = """
import torch
from torch import nn

def net():
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    return nn.Sequential(*layers), torch.zeros(1, 3, 12, 12)

class Pinning(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(6, 5), nn.Linear(5, 7)
        self.d = nn.Linear(6, 4)

    def forward(self, x):
        y = torch.nn.functional.glu(self.d(x).view(-1, 2, 2).transpose(1, 2).flatten(1), 1)
        return self.a(x).softmax(1), self.c(self.b(x)), (y + y.flip(1)).sum(1)

def pinning():
    return Pinning(), torch.zeros(2, 6)

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 72), nn.Linear(24, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).view(2, 5, 3, 4, 6).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(2, 5, 24))

def heads():
    return Heads(), torch.zeros(2, 5, 6)

def narrow():
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)]
    return nn.Sequential(*layers), torch.ones(1, 3, 6, 6)

def narrower():
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), torch.zeros(1, 3, 9, 9)

def total(module):
    return module(torch.ones(1, 3, 6, 6)).sum()

def undefined(module):
    return float("nan")

values = iter([1.0])

def second(module):
    return next(values, float("nan"))

def failing(module):
    raise KeyError("images")

not_callable = 3

def normed():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)), torch.zeros(1, 6)
"""


@pytest.fixture
def models(tmp_path: Path) -> str:
    (tmp_path / "models.py").write_text(MODELS)
    return str(tmp_path / "models.py")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "slim"


def _facts(*arguments: object) -> Any:
    return json.loads(_done(*arguments, "--json"))


def test_without_a_command_the_help_is_shown() -> None:
    text = _done()
    names = "inspect prune learn sparsify sensitivity show diff passes operators run"
    assert all(name in text for name in names.split())


def test_inspect_shows_orbits_widths_and_what_pins() -> None:
    text = _done("inspect", *SMALL)
    assert "features.3.expand3x3   Conv2d  64          orbit_3 × 64     prunable" in text
    assert "the weights are random (seed 0)" in text
    assert "pinned by" in text


def test_inspect_for_machines() -> None:
    facts = _facts("inspect", *SMALL)
    rows = {row["layer"]: row for row in facts["layers"]}
    orbits = {orbit["name"]: orbit for orbit in facts["orbits"]}
    assert rows["features.0"]["widths"] == [64]
    assert "features.0.weight[0]" in orbits[rows["features.0"]["orbits"][0]]["members"]
    assert rows["classifier.1"]["state"] == "pinned"
    assert rows["classifier.1"]["reason"]


def test_inspect_says_why_an_orbit_is_statistical(models: str) -> None:
    text = " ".join(_done("inspect", f"{models}:normed").split())
    reason = "layer normalisation takes statistics over this dimension"
    assert f"aten.native_layer_norm {reason} 8 80.0%" in text
    assert (
        "Of 10 output channels 0.0% can leave exactly, 80.0% approximately (statistical), and 20.0% are pinned." in text
    )


def test_inspect_says_what_every_operator_costs_the_dearest_first(models: str) -> None:
    facts = _facts("inspect", f"{models}:pinning")
    costs = [(row["operator"], row["channels"]) for row in facts["pinning"]]
    assert costs == [("aten._softmax", 12), ("output", 7), ("–", 4)]
    assert facts["outputs"] == {"exact": 5, "statistical": 0, "pinned": 23}
    assert sum(row["share"] for row in facts["pinning"]) == pytest.approx(23 / 28)
    text = _done("inspect", f"{models}:pinning")
    assert text.index("every position of this dimension") < text.index("output        ")


@pytest.mark.parametrize(("attention", "width"), [("dimensions", 6), ("heads", 4)])
def test_attention_loses_what_is_asked_for(models: str, out: Path, attention: str, width: int) -> None:
    assert [o["width"] for o in _facts("inspect", f"{models}:heads", "--attention", attention)["orbits"]] == [width]
    _done("prune", f"{models}:heads", "--attention", attention, "--ratio", "50%", "--out", out)
    plan = artifacts.read_plan_file(out)
    assert (plan.attention, plan.orbits[0].width, len(plan.orbits[0].kept)) == (attention, width, width // 2)


def test_prune_writes_a_folder_that_loads(out: Path) -> None:
    text = _done("prune", *SMALL, "--macs", "50%", "--out", out)
    assert "the weights are random (seed 0)" in text
    assert "Saved" in text
    model = build_model(ModelSource(SMALL[0])).model
    loaded = fxprune.load(out, model)
    before, after = artifacts.read_report(out).macs
    assert after == pytest.approx(before / 2, rel=0.01)
    assert loaded.module(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


def test_prune_for_machines(models: str, out: Path) -> None:
    facts = _facts("prune", f"{models}:net", "--macs", "50%", "--out", out, "--latency")
    assert facts["report"]["macs"][1] <= facts["report"]["macs"][0] / 2
    assert all(milliseconds > 0 for milliseconds in facts["report"]["latency_ms"])
    assert facts["spec"].startswith("mask-insertion,channel-selection{macs=50%}")


def test_prune_obeys_every_option(models: str, out: Path) -> None:
    options = ["--parameters", "90%", "--criterion", "l1", "--scope", "uniform", "--round-to", "2", "--min-width", "4"]
    options += ["--max-ratio", "0.5", "--exclude", "2", "--include", "[0-2]", "--seed", "5", "--frontend", "export"]
    _done("prune", f"{models}:net", *options, "--out", out)
    plan = artifacts.read_plan_file(out)
    assert (plan.seed, plan.frontend) == (5, "export")
    kept = {orbit.places[0]: len(orbit.kept) for orbit in plan.orbits}
    assert kept["0.weight[0]"] in (4, 6)
    assert kept["2.weight[0]"] == 8


@pytest.mark.parametrize(
    ("ratio", "kept"), [(["--ratio", "25%"], {6}), (["--ratio", "0=50%", "--ratio", "2=0.25"], {4, 6})]
)
def test_prune_by_ratio_for_all_or_for_layers(models: str, out: Path, ratio: list[str], kept: set[int]) -> None:
    _done("prune", f"{models}:net", *ratio, "--scope", "uniform", "--out", out)
    assert {len(orbit.kept) for orbit in artifacts.read_plan_file(out).orbits} == kept


def test_prune_through_statistics_on_request(models: str, out: Path) -> None:
    arguments = ("prune", f"{models}:normed", "--macs", "50%", "--out", out)
    assert "allow_statistical" in _mistake(*arguments)
    assert "approximate" in _done(*arguments, "--allow-statistical")


def test_prune_exports_and_keeps_json_clean(models: str, out: Path) -> None:
    pytest.importorskip("onnxscript")
    _facts("prune", f"{models}:net", "--macs", "50%", "--out", out, "--pt2", "--onnx")
    assert (out / "model.pt2").is_file()
    assert (out / "model.onnx").is_file()


def test_prune_measures_and_prints_on_request(models: str, out: Path) -> None:
    text = _done("prune", f"{models}:net", "--macs", "50%", "--out", out, "--latency", "--print-changes")
    assert "latency, ms" in text
    assert "--- mask-insertion:" in text
    assert "+%mask_channels = mask_channels(" in text


def test_changes_stay_out_of_json(models: str, out: Path) -> None:
    result = _call("prune", f"{models}:net", "--macs", "50%", "--out", out, "--print-changes", "--json")
    assert json.loads(result.stdout)["out"] == str(out)
    assert "+%mask_channels = mask_channels(" in result.stderr


def test_prune_loads_a_checkpoint(models: str, out: Path, tmp_path: Path) -> None:
    model = build_model(ModelSource(f"{models}:net")).model
    with torch.no_grad():
        model.get_parameter("0.weight")[[1, 3, 4, 6]] = 0
    torch.save(model.state_dict(), tmp_path / "state.pt")
    arguments = ("--checkpoint", tmp_path / "state.pt", "--ratio", "50%", "--scope", "uniform", "--out", out)
    assert "weights from state.pt" in _done("prune", f"{models}:net", *arguments)
    assert artifacts.read_plan_file(out).orbits[0].kept == (0, 2, 5, 7)


def test_the_seed_makes_runs_equal(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _done("prune", *SMALL, "--macs", "60%", "--seed", "4", "--out", tmp_path / name)
    for name in ("plan.json", "report.json", "graph.diff"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("a", "b")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_sparsify_writes_a_folder_that_loads(models: str, out: Path) -> None:
    text = _done("sparsify", f"{models}:narrow", "--macs", "60%", "--out", out)
    assert "sparsity" in text
    assert "Note: layers with fewer channels than a block of 1x4 stay dense: 0" in text
    assert "Note: weights as the callable made them" in text
    assert f"Saved {out}: graph.diff, inputs.json, model.safetensors, plan.json, report.json" in text
    loaded = fxprune.load(out, build_model(ModelSource(f"{models}:narrow")).model)
    before, after = artifacts.read_report(out).macs
    assert 0.5 * before < after <= 0.6 * before
    assert sorted(masked_weights(loaded.module)) == ["2.weight", "4.weight"]
    assert int(load_file(out / "model.safetensors")["2.weight"].count_nonzero()) < 8 * 16


def test_show_of_a_sparse_model_shows_its_sparsity(models: str, out: Path) -> None:
    _done("sparsify", f"{models}:narrow", "--sparsity", "2=75%", "--out", out)
    lines = [line.split() for line in _done("show", out).splitlines()]
    assert next(line for line in lines if line[:2] == ["2", "Conv2d"])[-3:] == ["0.0%", "→", "75.0%"]
    assert _facts("show", out)["report"]["layers"][1]["sparsity"] == [0.0, 0.75]
    assert "Conv2d(8→16, 75.0% sparse)" in _done("diff", out)


def test_sparsify_for_machines(models: str, out: Path) -> None:
    facts = _facts("sparsify", f"{models}:narrow", "--parameters", "50%", "--block", "1x1", "--out", out)
    assert facts["out"] == str(out)
    assert facts["spec"] == "weight-sparsification{parameters=50%,block=1x1}"
    assert facts["report"]["parameters"][1] <= facts["report"]["parameters"][0] / 2


def test_sparsify_obeys_every_option(models: str, out: Path) -> None:
    options = ["--sparsity", "50%", "--block", "2x4", "--scope", "global", "--layers", "conv", "--layers", "linear"]
    options += ["--exclude", "4", "--criterion", "random", "--max-sparsity", "90%", "--seed", "5"]
    _done("sparsify", f"{models}:narrow", *options[:6], "--layers", "conv", *options[10:], "--out", out)
    plan = artifacts.read_plan_file(out)
    assert (plan.seed, [(row.layer, float(row.mask().float().mean())) for row in plan.weights]) == (5, [("2", 0.5)])
    for option in ("block=2x4", "scope=global", "layers=conv", "exclude=4", "criterion=random", "max_sparsity=90%"):
        assert option in plan.spec
    assert "no convolution or linear layer matches 'linear'" in _mistake(
        "sparsify", f"{models}:narrow", *options, "--out", out.parent / "other"
    )


def test_sparsities_by_layer(models: str, out: Path) -> None:
    arguments = ("--sparsity", "2=50%", "--sparsity", "4=0.75", "--block", "1x1")
    _done("sparsify", f"{models}:narrow", *arguments, "--out", out)
    kept = {row.layer: float(row.mask().float().mean()) for row in artifacts.read_plan_file(out).weights}
    assert kept == {"2": 0.5, "4": 0.25}


def test_sparsify_to_the_macs_of_another_model(models: str, out: Path) -> None:
    arguments = ("--macs-of", f"{models}:narrower", "--block", "1x1", "--scope", "global")
    facts = _facts("sparsify", f"{models}:narrow", *arguments, "--out", out)
    assert facts["report"]["macs"] == [36 * (3 * 8 + 8 * 16 + 16 * 4), 36 * (3 * 8 + 8 * 4)]


def test_sparsify_exports_and_prints_changes(models: str, out: Path) -> None:
    pytest.importorskip("onnxscript")
    arguments = ("--sparsity", "2=50%", "--out", out, "--pt2", "--onnx", "--print-changes", "--json")
    result = _call("sparsify", f"{models}:narrow", *arguments)
    assert json.loads(result.stdout)["out"] == str(out)
    assert "Conv2d(8→16, 50.0% sparse)" in result.stderr
    assert (out / "model.pt2").is_file()
    assert (out / "model.onnx").is_file()


def test_sparsify_plots_on_request(models: str, out: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = out.parent / "plots" / "sparse"
    text = _done("sparsify", f"{models}:narrow", "--sparsity", "50%", "--out", out, "--plots", folder)
    assert f"Plotted {folder}: macs.png, sparsity.png" in text
    assert sorted(path.name for path in folder.iterdir()) == ["macs.png", "sparsity.png"]


def test_plots_without_matplotlib_are_refused_before_the_work(
    models: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(api, "sparsify", pytest.fail)
    arguments = ("sparsify", f"{models}:narrow", "--sparsity", "50%", "--out", out, "--plots", out.parent / "plots")
    assert "pip install 'fxprune[plots]'" in _mistake(*arguments)
    assert not out.exists()


def test_sensitivity_shows_what_single_layers_cost(models: str) -> None:
    text = _done("sensitivity", f"{models}:narrow", "--metric", f"{models}:total")
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["layer", "role", "sparsity", "total", "drop"]
    assert [line[:3] for line in lines[2:5]] == [
        ["0", "expansion", "95.8%"],
        ["2", "expansion", "95.3%"],
        ["4", "bottleneck", "95.3%"],
    ]
    assert "Note: weights as the callable made them" in text


def test_sensitivity_for_machines_in_files_and_plotted(models: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ("--sparsity", "50%", "--block", "1x4", "--layers", "conv", "--exclude", "4", "--criterion", "random")
    files = ("--plot", tmp_path / "plot.svg", "--out", tmp_path / "found.json")
    text = _done("sensitivity", f"{models}:narrow", *options, *files, "--json")
    assert (tmp_path / "found.json").read_text() == text
    assert (tmp_path / "plot.svg").stat().st_size > 0
    found = fxprune.Sensitivity.from_json(text)
    assert (found.metric, found.baseline, found.sparsity, found.block) == ("minus output error", 0.0, 0.5, "1x4")
    assert [(row.layer, row.sparsity) for row in found.layers] == [("2", 0.5)]
    assert [skip.layer for skip in found.skipped] == ["0"]


def test_progress_of_sensitivity_names_layers(models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[tuple[str, ...]] = []

    class Recorded(Progress):
        def __init__(self, names: tuple[str, ...], *, quiet: bool) -> None:
            stages.append(names)
            super().__init__(names, quiet=quiet)

    monkeypatch.setattr(sensitivity_command, "Progress", Recorded)
    _done("sensitivity", f"{models}:narrow")
    assert stages == [("build",), ("0", "2", "4")]


def test_show_and_diff_tell_of_a_saved_model(models: str, out: Path) -> None:
    _done("prune", f"{models}:net", "--macs", "50%", "--out", out)
    text = _done("show", out)
    assert "channel-selection{macs=50%}" in text
    assert "weights as the callable made them" in text
    assert "| layer" in _done("show", out, "--markdown")
    assert _facts("show", out)["report"]["macs"] == list(artifacts.read_report(out).macs)
    assert "+%_0 = 0 Conv2d(3→" in _done("diff", out)


def test_passes_are_listed_with_options_and_first_line() -> None:
    text = _done("passes")
    facts = {row["name"]: row for row in _facts("passes")}
    assert list(facts) == [kind.name for kind in PASSES]
    for kind in PASSES:
        first = (kind.__doc__ or "").splitlines()[0]
        assert first in text
        assert facts[kind.name]["does"] == first
    assert facts["channel-selection"]["options"]["criterion"] == "l2"
    assert "evidence" not in facts["channel-selection"]["options"]


def test_operators_are_listed_with_their_family_and_what_happens_there() -> None:
    rows = {row["operator"]: row for row in _facts("operators")}
    assert list(rows) == list(RULES)
    assert all(row["family"] in FAMILIES and row["does"] for row in rows.values())
    assert rows["aten.permute"] == {"operator": "aten.permute", "family": "movement", "does": "Reorder dimensions."}
    text = _done("operators")
    assert all(note in text for note in NOTES)


def test_the_page_of_operators_is_current() -> None:
    page = (Path(__file__).parents[1] / "docs" / "operators.md").read_text(encoding="utf-8")
    assert _done("operators", "--markdown") == page, (
        "docs/operators.md is not what the rules say; write it anew: fxprune operators --markdown > docs/operators.md"
    )


OPERATORS = [
    ("aten.permute", [("aten.permute", "movement", "Reorder")]),
    ("permute", [("aten.permute", "movement", "Reorder")]),
    ("aten::cat", [("aten.cat", "movement", "Concatenate")]),
    ("aten.relu", [("aten.relu", "pointwise", "Tagged as pointwise by PyTorch.")]),
    ("aten.relu_", [("aten.relu_", "pointwise", "Tagged as pointwise by PyTorch.")]),
    ("aten.hardswish_", [("aten.hardswish_", "pointwise", "As its out-of-place twin.")]),
    ("aten.add.Tensor", [("aten.add.Tensor", "pointwise", "Unite the operands")]),
    ("aten.linear", [("aten.linear", "composite", "PyTorch decomposes it")]),
    ("aten.geqrf", [("aten.geqrf", "none", "No rule: every channel that meets it is pinned.")]),
    (
        "aten.max",
        [("aten.max.default", "reduction", ""), ("aten.max.dim", "reduction", ""), ("aten.max.other", "pointwise", "")],
    ),
]


@pytest.mark.parametrize(("name", "expected"), OPERATORS, ids=[name for name, _ in OPERATORS])
def test_one_operator_is_explained(name: str, expected: list[tuple[str, str, str]]) -> None:
    rows = _facts("operators", name)
    assert [(row["operator"], row["family"]) for row in rows] == [row[:2] for row in expected]
    assert all(text in row["does"] for row, (*_, text) in zip(rows, expected, strict=True))
    assert all(row["does"] in _done("operators", name) for row in rows)


def test_run_prints_what_each_pass_changed_and_the_graph(models: str) -> None:
    text = _done("run", "--passes", "mask-insertion,orbit-detection,channel-surgery", f"{models}:net")
    assert "--- mask-insertion:" in text
    assert "makes orbit_0×8" in text
    assert "output %_4" in text


def test_run_for_machines(models: str) -> None:
    facts = _facts("run", "--passes", "mask-insertion,channel-selection{ratio=50%}", f"{models}:net")
    assert [step["name"] for step in facts["passes"]] == ["mask-insertion", "channel-selection"]
    assert all(step["modified"] for step in facts["passes"])
    assert "mask_channels" in facts["dump"]


BAD_INPUT = [
    (["frob"], "No such command 'frob'"),
    (["prune"], "Missing argument 'MODEL'"),
    (["prune", "{models}:net", "--macs", "50%"], "Missing option '--out'"),
    (["prune", "{models}:net", "--mac", "50%", "--out", "{out}"], "No such option"),
    (["prune", "{models}:net", "--out", "{out}"], "exactly one target"),
    (["prune", "{models}:net", "--out", "{out}", "--macs", "150%"], "more than the model has"),
    (["prune", "{models}:net", "--out", "{out}", "--macs", "1%"], "the minimum is"),
    (["prune", "{models}:net", "--out", "{out}", "--macs", "x"], "cannot read macs='x'"),
    (["prune", "{models}:net", "--out", "{out}", "--ratio", "1=30%", "--ratio", "20%"], "need a layer each"),
    (["prune", "{models}:net", "--out", "{out}", "--macs", "50%", "--exclude", "layer1"], "no layer matches 'layer1'"),
    (["prune", "{models}:net", "--out", "{out}", "--macs", "50%", "--criterion", "l3"], "did you mean 'l"),
    (["prune", "{models}:net", "--out", "{out}", "--macs", "50%", "--criterion", "taylor"], "needs data"),
    (["prune", "{models}:net", "--out", "{out}", "--macs", "50%", "--scope", "all"], "unknown scope 'all'"),
    (["prune", "{models}:net", "--out", "{out}", "--macs", "50%", "--round-to", "x"], "is not a valid integer"),
    (["prune", "{models}:net", "--out", "{out}", "--macs", "50%", "--input", "3y3"], "write 1x3x224x224"),
    (
        ["prune", "{models}:net", "--out", "{out}", "--macs", "50%", "--input", "1x4x12x12"],
        "does not run on the example inputs",
    ),
    (["prune", "{models}:net", "--out", "{out}", "--macs", "50%", "--frontend", "jit"], "unknown front end 'jit'"),
    (
        ["prune", "{models}:net", "--out", "{out}", "--macs", "50%", "--checkpoint", "no.pt"],
        "no checkpoint file 'no.pt'",
    ),
    (["prune", "{models}:ne", "--out", "{out}", "--macs", "50%"], "did you mean 'net'"),
    (["prune", "{models}:net", "--out", "{models}", "--macs", "50%"], "is a file"),
    (["inspect", "resnet18"], "did you mean 'torchvision:resnet18'"),
    (["inspect", "torchvision:resnet1"], "torchvision has no model 'resnet1'"),
    (["inspect", "{models}:net", "--attention", "head"], "unknown attention policy 'head'"),
    (
        ["prune", "{models}:net", "--out", "{out}", "--macs", "50%", "--attention", "x"],
        "known policies: dimensions, heads",
    ),
    (["operators", "aten.rellu"], "did you mean 'aten.relu'"),
    (["show", "{out}"], "has no plan.json"),
    (["diff", "{out}"], "has no graph.diff"),
    (["run", "--passes", "mask", "{models}:net"], "unknown pass 'mask'"),
    (["run", "--passes", "mask-insertion{x=1}", "{models}:net"], "no option 'x'"),
    (["run", "{models}:net"], "Missing option '--passes'"),
]

SPARSE_BAD_INPUT = [
    (["--sparsity", "50%", "--out"], "requires an argument"),
    ([], "exactly one target"),
    (["--macs", "50%", "--parameters", "50%"], "exactly one target"),
    (["--macs", "1", "--macs-of", "x"], "exactly one target: --macs"),
    (["--macs-of", "resnet18"], "did you mean 'torchvision:resnet18'"),
    (["--macs", "1%"], "the minimum is"),
    (["--sparsity", "120%"], "is outside [0, 1)"),
    (["--sparsity", "x"], "cannot read sparsity='x'"),
    (["--sparsity", "5%", "--sparsity", "6%"], "several --sparsity need a layer each"),
    (["--sparsity", "2=5%", "--layers", "2"], "not both"),
    (["--sparsity", "50%", "--block", "4"], "cannot read the block '4'"),
    (["--sparsity", "50%", "--layers", "7"], "no layer matches '7'"),
    (["--sparsity", "50%", "--scope", "all"], "unknown scope 'all'"),
    (["--sparsity", "50%", "--criterion", "l2"], "unknown criterion 'l2'"),
    (["--sparsity", "50%", "--max-sparsity", "0"], "max_sparsity is 0"),
    (["--sparsity", "50%", "--plots", "{models}"], "is a file"),
    (["--sparsity", "50%", "--out", "{models}"], "is a file"),
]

SENSITIVITY_BAD_INPUT = [
    (["--metric", "{models}:undefined"], "evaluating the dense model gave nan"),
    (["--metric", "{models}:failing"], "evaluating the dense model failed: KeyError: 'images'"),
    (["--metric", "{models}:second"], "evaluating '0' pruned to 95.8% gave nan"),
    (["--metric", "{models}:tota"], "did you mean 'total'"),
    (["--metric", "{models}:not_callable"], "has no callable 'not_callable'"),
    (["--metric", "top1"], "a metric is path/to/file.py:callable"),
    (["--metric", "no.py:top1"], "there is no file 'no.py'; a metric is"),
    (["--metric", "{models}:net"], "failed: TypeError"),
    (["--sparsity", "1"], "is outside [0, 1)"),
    (["--block", "1x64"], "no layer can be made sparse"),
    (["--layers", "linear"], "no convolution or linear layer matches 'linear'"),
    (["--plot", "{out}.jpg"], "give a file that ends in .png, .svg, .pdf"),
    (["--plot", "{out}/plot.png"], "there is no folder"),
    (["--out", "."], "it is a folder"),
]

BAD_INPUT += [(["sparsify", "{models}:narrow", "--out", "{out}", *given], text) for given, text in SPARSE_BAD_INPUT]
BAD_INPUT += [(["sensitivity", "{models}:narrow", *given], text) for given, text in SENSITIVITY_BAD_INPUT]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_INPUT, ids=[" ".join(row[0][:1]) + f" {i}" for i, row in enumerate(BAD_INPUT)]
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str, models: str, out: Path) -> None:
    given = [argument.replace("{models}", models).replace("{out}", str(out)) for argument in arguments]
    assert message in _mistake(*given)
    assert not out.exists()
    assert not list(out.parent.glob(".*")), "nothing is left half-written"


def test_a_folder_in_use_is_refused_before_the_work(models: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.mkdir()
    (out / "mine").write_text("mine")
    monkeypatch.setattr(api, "prune", pytest.fail)
    assert "is not empty" in _mistake("prune", f"{models}:net", "--macs", "50%", "--out", out)
    assert [path.name for path in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("error", [VerifyError("pass 'channel-surgery' broke the graph"), KeyError("conv1")])
def test_a_defect_is_exit_code_1_and_says_how_to_report_it(
    models: str, out: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(api, "prune", broken)
    result = _call("prune", f"{models}:net", "--macs", "50%", "--out", out)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert f"{type(error).__name__}: {error}" in result.stderr
    assert f"torch {torch.__version__}" in result.stderr
    assert "this is a defect of fxprune, not a mistake of yours. Please report it" in result.stderr
    assert not out.exists()


def test_an_interruption_leaves_nothing(models: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "save_model", interrupted)
    result = _call("prune", f"{models}:net", "--macs", "50%", "--out", out)
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
    assert [path for path in out.parent.iterdir() if path.is_dir() and path.name != "__pycache__"] == []


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_names_the_stage_on_a_terminal(monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(("build", "trace", "save"), quiet=quiet) as progress:
        progress.advance()
        progress.show()
        shown = terminal.getvalue()
    assert ("trace:" in shown and "1/3" in shown) != quiet
    assert quiet or terminal.getvalue().endswith("\r"), "the bar goes away when the work is done"


@pytest.mark.parametrize(("arguments", "code"), [(["passes"], 0), (["show", "nothing"], 2)])
def test_the_module_runs_as_a_program(arguments: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-m", "fxprune", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert (done.stdout == "") == bool(code)
