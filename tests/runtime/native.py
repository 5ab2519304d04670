"""Small C++ sources, compilers that misbehave, and forked processes for the tests of native kernels."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxprune.errors import BuildError
from fxprune.runtime.native.toolchain import toolchain

INSTRUCTION_SET = 'extern "C" const char* fxprune_instruction_set() { return "portable"; }\n'
ANSWER = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'


def _compiler_or_reason() -> tuple[str, str]:
    try:
        return " ".join(toolchain().command), ""
    except BuildError as error:
        return "", str(error)


_COMPILER, _NONE = _compiler_or_reason()

needs_compiler = pytest.mark.skipif(not _COMPILER, reason=_NONE or "there is a compiler")


def write_sources(folder: Path, **texts: str) -> Path:
    """Write sources that make a loadable library, and others by name: `answer="…"` becomes answer.cpp."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"isa": INSTRUCTION_SET, **texts}.items():
        (folder / f"{name}.cpp").write_text(text, encoding="utf-8")
    return folder


def call(library: Path, function: str) -> int:
    """Return what a function of a library returns, in this process."""
    return getattr(ctypes.CDLL(str(library)), function)()


def answer(library: Path) -> int:
    """Return the answer of a library that ANSWER was compiled into."""
    return call(library, "answer")


class Compiler:
    """A script that stands in for the compiler: notes every call, does something of its own, then compiles.

    Attributes:
        path: what $CXX is to name.
    """

    def __init__(self, folder: Path, own: str = "") -> None:
        self.path = folder / "compiler"
        self._notes = folder / "notes"
        self._notes.touch()
        self.path.write_text(f'#!/bin/sh\necho "$@" >> {self._notes}\n{own}\nexec {_COMPILER} "$@"\n', encoding="utf-8")
        self.path.chmod(0o755)

    def compiled(self) -> int:
        """Return how many files it was asked to compile."""
        return sum(" -c " in line for line in self._notes.read_text(encoding="utf-8").splitlines())


def in_processes(count: int, work: Callable[[int], Any]) -> list[int | None]:
    """Run `work(0)`, `work(1)`, … in forked processes at once; return their exit codes, None for one that hangs."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work, args=(number,)) for number in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes
