from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from fxprune.runtime.native import loading
from fxprune.runtime.native.build import build
from fxprune.runtime.native.loading import Library, Native
from tests.runtime.native import Compiler, in_processes, needs_compiler, write_sources

pytestmark = [needs_compiler, pytest.mark.usefixtures("cached")]


def _unset(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")


def _named(text: str) -> Callable[[pytest.MonkeyPatch, Path], None]:
    return lambda monkeypatch, _: monkeypatch.setenv("CXX", text)


def _script(text: str, mode: int = 0o755) -> Callable[[pytest.MonkeyPatch, Path], None]:
    def apply(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        script = tmp_path / "script"
        script.write_text(text, encoding="utf-8")
        script.chmod(mode)
        monkeypatch.setenv("CXX", str(script))

    return apply


def _cache_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "file"))


def _read_only_cache(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    def mkdir(path: Path, **_: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)


def _no_home(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.delenv("FXPRUNE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


IMPOSSIBLE = {
    "no program": (_named("/nonexistent -v"), "CXX names '/nonexistent', which is no program; name a C++ compiler, or"),
    "quotes": (_named('c++ "'), "which cannot be read (No closing quotation); name a C++ compiler"),
    "no compiler": (_unset, "there is no C++ compiler (c++, g++, clang++); install g++ or clang, or name one in CXX"),
    "not executable": (_script("#!/bin/sh\n", 0o644), "which is no program"),
    "no script": (_script("\x00\x01"), "cannot be run ("),
    "it fails": (_script("#!/bin/sh\necho no licence >&2; exit 3\n"), "fails (no licence); name another in CXX"),
    "it says nothing": (_script("#!/bin/sh\nexit 3\n"), "fails (exit status 3); name another in CXX"),
    "cache in a file": (_cache_in_a_file, "cannot be written (Not a directory); name a folder in FXPRUNE_CACHE"),
    "read-only cache": (_read_only_cache, "cannot be written (Read-only file system); name a folder in FXPRUNE_CACHE"),
    "no home": (_no_home, "there is no home folder to keep a library in; name a folder in FXPRUNE_CACHE"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_built_says_why_and_the_log_says_so_once(
    case: str,
    sources: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    arrange, message = IMPOSSIBLE[case]
    arrange(monkeypatch, tmp_path)
    caplog.set_level(logging.DEBUG, "fxprune")
    native = Native(sources)
    assert not native.load()
    assert not native.load()
    assert native.library() is None
    assert message in (native.why_not() or "")
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("fxprune", logging.WARNING)
    assert record.getMessage() == f"no native kernels, other backends stand in: {native.why_not()}"
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("word", ["0", "off", "FALSE", "no"])
def test_native_kernels_can_be_turned_off_quietly(
    word: str, sources: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FXPRUNE_NATIVE", word)
    native = Native(sources)
    assert not native.load()
    assert native.why_not() == f"FXPRUNE_NATIVE={word} turns native kernels off; unset it to have them"
    assert compiler.compiled() == 0
    assert not caplog.records


def test_what_is_loaded_says_what_it_is(sources: Path, caplog: pytest.LogCaptureFixture) -> None:
    native = Native(sources)
    assert native.load()
    assert native.why_not() is None
    loaded = native.library()
    assert isinstance(loaded, Library)
    assert loaded == Library(build(sources).path, "portable", loaded.seconds)
    assert loaded.seconds > 0
    assert str(loaded.path) in torch.ops.loaded_libraries
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extern int missing; extern int *needed; int *needed = &missing;\n", "undefined symbol: missing"),
        (None, "undefined symbol: fxprune_instruction_set"),
    ],
)
def test_a_library_that_does_not_load_is_a_reason(
    text: str | None, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_sources(tmp_path / "sources", broken=text or "int nothing;\n")
    if text is None:
        (folder / "isa.cpp").unlink()
    native = Native(folder)
    assert message in (native.why_not() or "")
    assert "cannot be loaded" in (native.why_not() or "")
    assert len(caplog.records) == 1


def test_threads_that_start_at_once_share_one_build(sources: Path, compiler: Compiler) -> None:
    native, barrier, answers = Native(sources), threading.Barrier(4), []

    def work() -> None:
        barrier.wait()
        answers.append(native.load())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 4
    assert compiler.compiled() == 2


def test_a_process_forked_while_its_parent_compiles_loads_by_itself(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native, codes = Native(sources), []

    def build_and_fork(folder: Path) -> object:
        monkeypatch.setattr(loading, "build", build)
        codes.extend(in_processes(1, lambda _: sys.exit(not native.load())))
        return build(folder)

    monkeypatch.setattr(loading, "build", build_and_fork)
    assert native.load()
    assert codes == [0]


OPERATOR = """
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

// Writes into each element which of torch's threads did so.
static void threads(at::Tensor& out) {
  int* data = out.mutable_data_ptr<int>();
  at::parallel_for(0, out.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) data[i] = at::get_thread_num();
  });
}
TORCH_LIBRARY(fxprune_test, m) { m.def("threads(Tensor(a!) out) -> ()"); }
TORCH_LIBRARY_IMPL(fxprune_test, CPU, m) { m.impl("threads", threads); }
"""


def _openmp_libraries() -> set[str]:
    mapped = psutil.Process().memory_maps()
    return {region.path for region in mapped if re.search(r"lib(gomp|omp|iomp5)", Path(region.path).name)}


def test_an_operator_runs_in_torchs_own_threads(tmp_path: Path) -> None:
    before, threads = _openmp_libraries(), torch.get_num_threads()
    native = Native(write_sources(tmp_path / "sources", operator=OPERATOR))
    assert native.why_not() is None
    out = torch.full((2,), -1, dtype=torch.int32)
    torch.set_num_threads(2)
    try:
        torch.ops.fxprune_test.threads(out)
    finally:
        torch.set_num_threads(threads)
    assert out.tolist() == [0, 1]
    assert _openmp_libraries() == before, "a second OpenMP would have threads of its own"
