"""The C++ compiler of this machine: which one, the flags it gets, and what those mean on this CPU.

The compiler is $CXX, or the first of c++, g++ and clang++ on the path. torch.utils.cpp_extension is not used: it
needs setuptools, warns of a missing CUDA toolkit when imported, and its lock outlives a process that was killed.

One run of the preprocessor tells everything that a cache must know: with the flags given, the predefined macros name
the compiler's version, the C++ standard and every instruction set of this CPU (`__AVX512VNNI__`).
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fxprune.errors import BuildError

__all__ = ["OPENMP", "Toolchain", "include_flags", "library_flags", "run", "toolchain"]

OPENMP = "-fopenmp"

_COMPILERS = ("c++", "g++", "clang++")
_REQUIRED = ("-O3", "-DNDEBUG", "-fPIC", "-ffp-contract=off")
"""Without contraction, a product and a sum round twice on every CPU, as they do in the reference."""

_LIMIT = 600
"""Seconds after which a run of the compiler is given up; the slowest file takes about ten."""


@dataclass(frozen=True)
class Toolchain:
    """A compiler that was found and tried.

    Attributes:
        command: the program and the arguments that $CXX gives it.
        flags: those that every file is compiled with; include paths stand apart, for they say nothing of the result.
        macros: what the compiler predefines under these flags, as it writes them.
    """

    command: tuple[str, ...]
    flags: tuple[str, ...]
    macros: str


def toolchain(extra_flags: Sequence[str] = ()) -> Toolchain:
    """Find the compiler and the flags that it takes: those of this CPU and of torch, then `extra_flags`.

    Raises:
        BuildError: there is no compiler, or it refuses a flag that cannot be left out.
    """
    command = _find_compiler()
    required, optional = _required_flags(), _optional_flags()
    try:
        tools = _with_flags(command, (*required, *optional, *extra_flags))
    except BuildError:
        taken = (flag for flag in optional if _takes(command, flag))
        tools = _with_flags(command, (*required, *taken, *extra_flags))
    if OPENMP not in tools.flags or _shares_openmp(tools.macros):
        return tools
    return _with_flags(command, tuple(flag for flag in tools.flags if flag != OPENMP))


def include_flags() -> tuple[str, ...]:
    """Return where torch's headers are, as system headers: their warnings are not ours."""
    root = _torch_folder() / "include"
    return ("-isystem", str(root), "-isystem", str(root / "torch" / "csrc" / "api" / "include"))


def library_flags() -> tuple[str, ...]:
    """Return what a shared library is linked with: torch, which the process has loaded already."""
    return (f"-L{_torch_folder() / 'lib'}", "-ltorch_cpu", "-lc10")


def run(command: Sequence[str], subject: str) -> str:
    """Run the compiler and return what it writes.

    Raises:
        BuildError: it fails, takes too long or cannot be started; the message begins with `subject`.
    """
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_LIMIT, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{subject}: {command[0]} was given up after {_LIMIT} s; name another in CXX") from None
    except OSError as error:
        raise BuildError(f"{subject}: {command[0]} cannot be run ({error}); name another in CXX") from error
    if done.returncode:
        said = _complaint(done.stderr) or f"exit status {done.returncode}"
        raise BuildError(f"{subject}: {command[0]} fails ({said}); name another in CXX", done.stderr)
    return done.stdout


def _find_compiler() -> tuple[str, ...]:
    named = _named_compiler(os.environ.get("CXX", ""))
    for name in named[:1] or _COMPILERS:
        program = shutil.which(name)
        if program:
            return (program, *named[1:])
    if named:
        raise BuildError(f"CXX names {named[0]!r}, which is no program; name a C++ compiler, or unset it")
    raise BuildError(f"there is no C++ compiler ({', '.join(_COMPILERS)}); install g++ or clang, or name one in CXX")


def _named_compiler(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise BuildError(f"CXX is {command!r}, which cannot be read ({error}); name a C++ compiler") from None


def _required_flags() -> tuple[str, ...]:
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return (_standard(torch.__config__.show()), *_REQUIRED, abi)


def _standard(config: str) -> str:
    """Return the flag of the C++ standard that torch was built with; its headers need no less.

    >>> _standard("- C++ Version: 202002"), _standard("- C++ Version: 201703")
    ('-std=c++20', '-std=c++17')
    """
    version = re.search(r"C\+\+ Version: (\d+)", config)
    return "-std=c++17" if version and int(version[1]) <= 201703 else "-std=c++20"


def _optional_flags() -> tuple[str, ...]:
    """Return what is left out where the compiler does not know it: slower, but right."""
    return ("-march=native", OPENMP) if torch.backends.openmp.is_available() else ("-march=native",)


def _shares_openmp(macros: str) -> bool:
    """Whether what the compiler calls for OpenMP is in the library that torch has loaded; clang and GCC differ."""
    entry = "__kmpc_fork_call" if "#define __clang__ " in macros else "GOMP_parallel"
    return hasattr(ctypes.CDLL(torch._C.__file__), entry)


def _with_flags(command: tuple[str, ...], flags: tuple[str, ...]) -> Toolchain:
    return Toolchain(command, flags, _macros(command, flags))


def _macros(command: Sequence[str], flags: Sequence[str]) -> str:
    return run([*command, *flags, "-x", "c++", "-E", "-dM", os.devnull], "flags")


def _takes(command: Sequence[str], flag: str) -> bool:
    try:
        _macros(command, [flag])
    except BuildError:
        return False
    return True


def _torch_folder() -> Path:
    return Path(torch.__file__).parent


def _complaint(output: str) -> str:
    """Return the line of a compiler's output that says most: the first that names an error, else the last."""
    lines = output.strip().splitlines() or [""]
    return next((line for line in lines if "error" in line), lines[-1]).strip()
