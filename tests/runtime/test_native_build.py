from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from fxprune.errors import BuildError
from fxprune.runtime.native import cache
from fxprune.runtime.native.build import SOURCES, build
from fxprune.runtime.native.toolchain import OPENMP, toolchain
from tests.runtime.native import ANSWER, Compiler, answer, call, in_processes, needs_compiler, write_sources

pytestmark = [needs_compiler, pytest.mark.usefixtures("cached")]

ROOT = Path(__file__).parents[2]


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def corrupt(path: Path, content: bytes) -> None:
    """Replace a file by a new one: what other processes have mapped stays as it is."""
    path.unlink()
    path.write_bytes(content)


def test_sources_become_one_library(sources: Path, compiler: Compiler) -> None:
    built = build(sources)
    assert answer(built.path) == 42
    assert built.seconds > 0
    assert compiler.compiled() == 2


def test_what_the_cache_has_is_not_compiled_again(sources: Path, compiler: Compiler, cached: Path) -> None:
    first, before = build(sources), listing(cached)
    again = build(sources)
    assert (again.path, again.seconds) == (first.path, 0)
    assert compiler.compiled() == 2
    assert listing(cached) == before, "a hit writes nothing, so the cache may be read-only"


def test_nothing_but_the_library_stays_in_the_cache(sources: Path, cached: Path) -> None:
    library = build(sources).path
    assert [path for path in cached.rglob("*") if path.is_file()] == [library]
    assert list(library.parent.iterdir()) == [library]


def test_the_key_does_not_know_where_the_sources_are(sources: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(sources, tmp_path / "elsewhere")
    assert build(elsewhere).path == build(sources).path


def _edit(name: str, text: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda folder, _: (folder / name).write_text(text, encoding="utf-8") and None


def _other_torch(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "0.0.1")


def _other_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = 'case "$*" in *-dM*) set -- "$@" -D__AVX1024__=1;; esac'
    compiler = Compiler(folder.parent, lacking)
    monkeypatch.setenv("CXX", str(compiler.path))


CHANGES = {
    "source": _edit("answer.cpp", ANSWER + "// other\n"),
    "header": _edit("answer.h", "#define ANSWER 43\n"),
    "file": _edit("more.cpp", "int more;\n"),
    "torch": _other_torch,
    "cpu": _other_cpu,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_goes_into_a_library_goes_into_its_key(
    change: str, sources: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert os.environ["CXX"] == str(compiler.path), "the path of the compiler is the same before and after"
    before = build(sources).path
    CHANGES[change](sources, monkeypatch)
    assert build(sources).path.parent != before.parent


def test_another_compiler_makes_another_library(sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = build(sources).path
    monkeypatch.setenv("CXX", str(Compiler(tmp_path).path))
    assert build(sources).path.parent != before.parent


def test_flags_make_a_variant_beside_the_others(sources: Path, tmp_path: Path) -> None:
    write_sources(sources, variant='extern "C" int variant() { return VARIANT; }\n')
    paths = [build(sources, (f"-DVARIANT={number}",), tmp_path / "variants").path for number in (1, 2)]
    assert [call(path, "variant") for path in paths] == [1, 2]
    assert {path.parents[1] for path in paths} == {tmp_path / "variants"}


def test_flags_that_change_no_macro_are_in_the_key(sources: Path) -> None:
    assert build(sources, ("-fno-unroll-loops",)).path.parent != build(sources).path.parent


def test_the_compiler_may_come_with_arguments(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "answer.h").unlink()
    (sources / "answer.h").touch()
    monkeypatch.setenv("CXX", f"{toolchain().command[0]} -DANSWER=7")
    assert answer(build(sources).path) == 7


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: content[:0],
    "one bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "other": lambda content: b"no library" + content[:0],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_anew(damage: str, sources: Path, compiler: Compiler) -> None:
    library = build(sources).path
    corrupt(library, DAMAGES[damage](library.read_bytes()))
    again = build(sources)
    assert answer(again.path) == 42
    assert compiler.compiled() == 4
    assert build(sources).seconds == 0


def test_a_file_where_the_entry_belongs_is_a_clear_error(sources: Path) -> None:
    entry = build(sources).path.parent
    shutil.rmtree(entry)
    entry.touch()
    with pytest.raises(BuildError, match=re.escape(f"the cache {entry} cannot be written (File exists)")):
        build(sources)


def test_processes_that_start_at_once_agree(sources: Path, compiler: Compiler, cached: Path) -> None:
    barrier = multiprocessing.get_context("fork").Barrier(3)

    def work(_: int) -> None:
        barrier.wait()
        assert answer(build(sources).path) == 42

    assert in_processes(3, work) == [0, 0, 0]
    assert len([path for path in cached.rglob("*") if path.is_file()]) == 1
    assert 2 <= compiler.compiled() <= 6
    assert build(sources).seconds == 0


def test_the_library_of_whoever_is_first_is_used(
    sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While one process compiles, another publishes a library of the same key and other bytes."""
    entry = build(sources).path.parent
    shutil.rmtree(entry)
    other = tmp_path / "other"
    other.write_bytes(b"compiled by another")
    workspace = cache.workspace

    def overtaken(entry: Path) -> object:
        entry.mkdir()
        cache.publish(other, entry)
        return workspace(entry)

    monkeypatch.setattr(cache, "workspace", overtaken)
    assert build(sources).path.read_bytes() == b"compiled by another"


def test_a_process_killed_while_it_compiles_is_in_nobodys_way(
    sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cached: Path
) -> None:
    once = tmp_path / "killed"
    kill = f'case "$*" in *" -c "*) mkdir {once} 2>/dev/null && kill -9 $PPID;; esac'
    monkeypatch.setenv("CXX", str(Compiler(tmp_path, kill).path))
    assert in_processes(1, lambda _: build(sources)) == [-9]
    assert list(cached.rglob("building-*")), "it was killed too early or too late to say anything"
    assert answer(build(sources).path) == 42


def test_a_source_that_does_not_compile_is_named_with_its_error(sources: Path) -> None:
    write_sources(sources, wrong="int f() {\n  return nothing;\n}\n")
    with pytest.raises(BuildError, match=r"compiling wrong\.cpp: .*wrong\.cpp:2:\d+: .*error: .*nothing") as caught:
        build(sources)
    assert "return nothing;" in caught.value.output


def test_a_failed_build_leaves_nothing_behind(sources: Path, cached: Path) -> None:
    write_sources(sources, wrong="wrong\n")
    with pytest.raises(BuildError):
        build(sources)
    assert [path for path in cached.rglob("*") if path.is_file() or path.name.startswith("building")] == []


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="holds no C\\+\\+ sources; install fxprune anew"):
        build(tmp_path)


def test_flags_that_the_compiler_does_not_know_are_left_out(
    sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refuse = 'case "$*" in *-march=native*) echo "error: -march=native" >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", str(Compiler(tmp_path, refuse).path))
    assert "-march=native" not in toolchain().flags
    assert "-O3" in toolchain().flags
    assert answer(build(sources).path) == 42


def test_openmp_is_left_out_where_it_would_need_another_library_than_torchs(
    sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    as_clang = 'case "$*" in *-dM*) set -- "$@" -D__clang__=1;; esac'
    monkeypatch.setenv("CXX", str(Compiler(tmp_path, as_clang).path))
    assert (OPENMP in toolchain().flags) == hasattr(ctypes.CDLL(torch._C.__file__), "__kmpc_fork_call")
    assert answer(build(sources).path) == 42


def test_flags_that_the_caller_wants_are_not_left_out(sources: Path) -> None:
    with pytest.raises(BuildError, match=r"flags: .*-fnonsense"):
        build(sources, ("-fnonsense",))


def test_flags_of_the_caller_come_last() -> None:
    assert toolchain(("-O1",)).flags[-1] == "-O1"
    assert "-ffp-contract=off" in toolchain().flags


def test_every_source_is_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["fxprune.runtime.native"]
    names = [path.name for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h")]
    assert [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)] == []
