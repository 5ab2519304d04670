"""Compiles a folder of C++ sources into one shared library, once for each machine and torch.

    folder/*.cpp, folder/*.h  →  <cache>/<key>/<checksum>.so

The key is a hash of the text of all sources and headers, the compiler and its predefined macros (its version and the
instruction sets of this CPU), the flags and torch's version. It does not know Python: the library links only torch.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from fxprune.errors import BuildError
from fxprune.runtime.native import cache
from fxprune.runtime.native.toolchain import OPENMP, Toolchain, include_flags, library_flags, run, toolchain

__all__ = ["SOURCES", "Built", "build", "build_program"]

SOURCES = Path(__file__).parent
"""The folder of fxprune's own kernels."""

_KEYED = (".cpp", ".h")

_TORCH_HEADER = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10)/", re.MULTILINE)


@dataclass(frozen=True)
class Built:
    """A library on disk.

    Attributes:
        path: the file, in the cache.
        seconds: how long it took to compile; 0 where it was there already.
    """

    path: Path
    seconds: float


def build(folder: Path = SOURCES, extra_flags: Sequence[str] = (), into: Path | None = None) -> Built:
    """Return the library of a folder of sources, compiled where the cache has none.

    Args:
        folder: holds `*.cpp` and `*.h`; everything in it goes into the key.
        extra_flags: come last, so they win: `-mno-avx512f` compiles what a CPU without AVX-512 would get.
        into: the folder of the cache; the user's own where none is given.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written to.
    """
    sources = _sources(folder)
    tools = toolchain(extra_flags)
    entry = (into or cache.cache_folder()) / _key(folder, tools)
    found = cache.find(entry)
    if found:
        return Built(found, 0.0)
    started = time.perf_counter()
    with cache.workspace(entry) as scratch:
        library = _link_library(tools, _compile(tools, sources, scratch), scratch / "library")
        # Another process may have been first: then both use its library.
        path = cache.find(entry) or cache.publish(library, entry)
    return Built(path, time.perf_counter() - started)


def build_program(main: Path, into: Path, extra_flags: Sequence[str] = (), folder: Path = SOURCES) -> Path:
    """Compile a file that holds `main` with the sources of a folder that need no torch; return the program.

    For tests: a program of its own runs under sanitizers, which do not fit into a Python process, and as code for
    other CPUs. Nothing is cached.

    Args:
        main: the file, with any ending that the compiler takes for C++.
        into: an existing folder for objects and program.
        extra_flags: as in `build`; `-fsanitize=address`, say.
        folder: where the sources are.

    Raises:
        BuildError: as in `build`.
    """
    tools = toolchain(extra_flags)
    sources = [main, *(path for path in _sources(folder) if _is_torch_free(path))]
    objects = _compile(tools, sources, into)
    program = into / main.stem
    run([*tools.command, *tools.flags, *map(str, objects), "-o", str(program)], f"linking {program.name}")
    return program


def _sources(folder: Path) -> list[Path]:
    """List the files to compile, those with torch's headers first: they take longest."""
    found = sorted(folder.glob("*.cpp"))
    if not found:
        raise BuildError(f"{folder} holds no C++ sources; install fxprune anew")
    return sorted(found, key=_is_torch_free)


def _is_torch_free(source: Path) -> bool:
    return not _TORCH_HEADER.search(source.read_text(encoding="utf-8"))


def _key(folder: Path, tools: Toolchain) -> str:
    texts = [
        (path.name, path.read_text(encoding="utf-8")) for path in sorted(folder.iterdir()) if path.suffix in _KEYED
    ]
    return cache.key_of([texts, tools.command, tools.flags, tools.macros, str(torch.__version__)])


def _compile(tools: Toolchain, sources: Sequence[Path], scratch: Path) -> list[Path]:
    """Compile every source into an object file, as many at once as there are CPUs."""

    def compile_one(source: Path) -> Path:
        target = scratch / f"{source.name}.o"
        what = ["-c", str(source), "-o", str(target)]
        run([*tools.command, *tools.flags, *include_flags(), *what], f"compiling {source.name}")
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def _link_library(tools: Toolchain, objects: Sequence[Path], target: Path) -> Path:
    # Not OpenMP: its symbols are those that torch has loaded, and a second runtime would have threads of its own.
    flags = [flag for flag in tools.flags if flag != OPENMP]
    run([*tools.command, *flags, "-shared", *map(str, objects), *library_flags(), "-o", str(target)], "linking")
    return target
