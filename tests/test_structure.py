"""The layout of the packages: imports run downwards, and lists equal folders."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxprune
import passes
from fxprune.graph.passes import Pass

ROOT = Path(__file__).parents[1]

LAYERS = (
    {"errors"},
    {"runtime", "console", "callables", "machine"},
    {"graph"},
    {"labels"},
    {"narrowing", "cost", "budget"},
    {"importance", "selection", "batchnorm", "checkpoint"},
    {"sparsity", "gating"},
    {"quantization"},
    {"plan", "training"},
    {"report"},
    {"survey"},
    {"insights", "artifacts", "latency", "zoo"},
    {"plots", "lowering", "timing", "recipes"},
    {"passes"},
    {"api"},
    {"cli"},
    {"__main__"},
)
"""From low to high; modules of one layer do not import each other."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

FACADE = Path("fxprune/__init__.py")
"""Imports from everywhere: the façade lazily."""


def _sources() -> list[Path]:
    found = [*(ROOT / "fxprune").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in found if path.relative_to(ROOT) != FACADE)


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield node.module if node.module != "fxprune" else f"fxprune.{node.names[0].name}"


def _layer(module: str) -> str | None:
    """Name the layer of a dotted module; None for other packages."""
    parts = module.split(".")
    if parts[0] == "passes":
        return "passes"
    return parts[1] if parts[0] == "fxprune" else None


def _dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


@pytest.mark.parametrize("path", _sources(), ids=str)
def test_imports_run_downwards(path: Path) -> None:
    own = _layer(_dotted(path))
    assert own in LEVEL, f"{path} belongs to no layer; add it to LAYERS"
    for module in _imported(path):
        other = _layer(module)
        if other is None or other == own:
            continue
        assert other in LEVEL, f"{path} imports {module}, which belongs to no layer"
        assert LEVEL[other] < LEVEL[own], f"{path} ({own}) imports {module} ({other}), which is not below it"


@pytest.mark.parametrize("path", sorted((ROOT / "passes").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_no_pass_imports_another(path: Path) -> None:
    assert not [module for module in _imported(path.relative_to(ROOT)) if _layer(module) == "passes"]


@pytest.mark.parametrize("path", sorted((ROOT / "fxprune" / "runtime").glob("*.py")), ids=lambda path: path.stem)
def test_the_runtime_stands_on_torch_alone(path: Path) -> None:
    ours = {module for module in _imported(path.relative_to(ROOT)) if module.split(".")[0] in ("fxprune", "passes")}
    assert all(module.startswith("fxprune.runtime") for module in ours)


def test_the_list_of_passes_equals_the_folder() -> None:
    files = {path.stem for path in (ROOT / "passes").glob("[!_]*.py")}
    assert {kind.__module__.removeprefix("passes.") for kind in passes.PASSES} == files
    assert {kind.name.replace("-", "_") for kind in passes.PASSES} == files
    assert {kind.__name__ for kind in passes.PASSES} == {name for name in passes.__all__ if name != "PASSES"}
    assert len(passes.PASSES) == len(files)


@pytest.mark.parametrize("kind", passes.PASSES, ids=lambda kind: kind.name)
def test_a_pass_documents_its_rewrite(kind: type[Pass]) -> None:
    text = kind.__doc__ or ""
    assert re.search(r"^\s+Before\b", text, re.MULTILINE), f"{kind.name} shows no 'Before'"
    assert re.search(r"^\s+After\b", text, re.MULTILINE), f"{kind.name} shows no 'After'"
    assert text.index("Before") < text.index("After")
    assert not text.splitlines()[0].endswith(","), "the first line is a sentence of its own"


@pytest.mark.parametrize("package", ["fxprune", "passes"])
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_everything_in_the_public_list_exists() -> None:
    assert [name for name in fxprune.__all__ if not hasattr(fxprune, name)] == []


def test_a_name_that_does_not_exist_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prunee'"):
        fxprune.prunee  # noqa: B018


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", ".ci/run"])
def test_what_a_reader_expects_is_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


def test_ci_can_be_executed() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
