"""Kernels in C++ that are compiled on first use, for the CPU that they run on.

The folder holds the sources; `load` compiles them with the compiler of this machine, keeps the library in the user's
cache and loads it into torch, where the sources register what they implement. Where that cannot be done (no compiler,
a build that fails, a cache that cannot be written) one line of log says why, and callers take another backend.

Environment: CXX names the compiler, FXPRUNE_CACHE the folder of the cache; FXPRUNE_NATIVE=0 does without all this.

    loading.py     once a process, whatever happens
    build.py       sources to library
    cache.py       libraries on disk
    toolchain.py   the compiler and its flags
"""

from __future__ import annotations

from fxprune.runtime.native.loading import Library, Native

__all__ = ["Library", "library", "load", "why_not"]

_NATIVE = Native()


def load() -> bool:
    """Compile and load the kernels, the first time; say whether torch has them. Never raises for want of them."""
    return _NATIVE.load()


def library() -> Library | None:
    """Return the library that is loaded: its path, instruction set, seconds of compiling. Loads first."""
    return _NATIVE.library()


def why_not() -> str | None:
    """Return the reason why there are no native kernels, with its remedy; None where there are. Loads first."""
    return _NATIVE.why_not()
