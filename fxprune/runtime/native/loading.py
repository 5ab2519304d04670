"""Loads a library of kernels into this process: once, from any thread, with one line of log where it fails."""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fxprune.errors import BuildError
from fxprune.runtime.locks import ForkedLock
from fxprune.runtime.native.build import SOURCES, Built, build

__all__ = ["Library", "Native"]

_LOG = logging.getLogger("fxprune")
_OFF = ("0", "false", "no", "off")


@dataclass(frozen=True)
class Library:
    """A library of kernels that is loaded.

    Attributes:
        path: the file.
        instruction_set: what it was compiled for, by its own account: `avx512-vnni`, `avx2`, `portable`, ….
        seconds: how long compiling took; 0 where the cache had it.
    """

    path: Path
    instruction_set: str
    seconds: float


class Native:
    """The kernels of one folder of sources; the first question compiles and loads them, the answer stays.

    Args:
        folder: the sources, see `build`.
    """

    def __init__(self, folder: Path = SOURCES) -> None:
        self._folder = folder
        self._outcome: Library | str | None = None
        self._lock = ForkedLock()

    def load(self) -> bool:
        """Say whether the kernels are loaded; the first call does it."""
        return isinstance(self._settled(), Library)

    def library(self) -> Library | None:
        """Return what is loaded, or None."""
        outcome = self._settled()
        return outcome if isinstance(outcome, Library) else None

    def why_not(self) -> str | None:
        """Return why nothing is loaded and what to do about it, or None."""
        outcome = self._settled()
        return outcome if isinstance(outcome, str) else None

    def _settled(self) -> Library | str:
        if self._outcome is None:
            with self._lock.current:
                if self._outcome is None:
                    self._outcome = _attempt(self._folder)
        return self._outcome


def _attempt(folder: Path) -> Library | str:
    """Build and load a library, or return why not; that nobody wants it is no news for the log."""
    switch = os.environ.get("FXPRUNE_NATIVE", "")
    if switch.lower() in _OFF:
        return f"FXPRUNE_NATIVE={switch} turns native kernels off; unset it to have them"
    try:
        return _load(build(folder))
    except BuildError as error:
        _LOG.warning("no native kernels, other backends stand in: %s", error)
        return str(error)


def _load(built: Built) -> Library:
    try:
        torch.ops.load_library(str(built.path))
        instruction_set = _instruction_set(built.path)
    except (OSError, RuntimeError, AttributeError) as error:
        # torch says that it could not, and hides in the cause what the linker said.
        said = error.__cause__ or error
        remedy = "name another folder in FXPRUNE_CACHE or another compiler in CXX"
        raise BuildError(f"{built.path} cannot be loaded ({said}); {remedy}") from error
    return Library(built.path, instruction_set, built.seconds)


def _instruction_set(path: Path) -> str:
    ask = ctypes.CDLL(str(path)).fxprune_instruction_set
    ask.restype = ctypes.c_char_p
    return ask().decode()
