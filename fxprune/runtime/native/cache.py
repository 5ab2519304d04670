"""Compiled libraries on disk: found by what they were made from, checked by what they contain.

    <folder>/native/<key>/<checksum>.so

<folder> is $FXPRUNE_CACHE, or fxprune in the user's cache folder. <key> is a hash of all that went into the library,
<checksum> one of its bytes: a truncated file does not match its own name and counts as absent.

A library is written under another name and renamed, so whoever looks sees all of it or nothing. Processes that start
at once may compile the same twice, but none waits for another, and none is harmed when another is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fxprune.errors import BuildError

__all__ = ["cache_folder", "find", "key_of", "publish", "workspace"]

_DIGITS = 32
"""Of a SHA-256 in hexadecimal: no two files meet by chance in 128 bits."""


def cache_folder() -> Path:
    """Return where libraries are kept: below $FXPRUNE_CACHE, $XDG_CACHE_HOME/fxprune or ~/.cache/fxprune.

    Raises:
        BuildError: none is set and there is no home.
    """
    try:
        base = os.environ.get("FXPRUNE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fxprune"
        return Path(base).expanduser().absolute() / "native"
    except RuntimeError:
        raise BuildError("there is no home folder to keep a library in; name a folder in FXPRUNE_CACHE") from None


def key_of(parts: Sequence[object]) -> str:
    """Return the name of what is made from these parts: strings, and tuples of strings.

    >>> key_of(["ab", "c"]) == key_of(["a", "bc"])
    False
    """
    return _hash(json.dumps(parts).encode())


def find(entry: Path) -> Path | None:
    """Return the library of an entry, whole as it was published; None where there is none. Writes nothing."""
    try:
        return next((path for path in sorted(entry.glob("*.so")) if _hash(path.read_bytes()) == path.stem), None)
    except OSError:
        return None


@contextmanager
def workspace(entry: Path) -> Iterator[Path]:
    """Make a folder inside an entry to build in; it is gone afterwards.

    Raises:
        BuildError: the entry cannot be written to.
    """
    try:
        entry.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=entry, ignore_cleanup_errors=True) as scratch:
            yield Path(scratch)
    except OSError as error:
        said = error.strerror or error
        raise BuildError(f"the cache {entry} cannot be written ({said}); name a folder in FXPRUNE_CACHE") from error


def publish(library: Path, entry: Path) -> Path:
    """Move a library that was built in the entry's workspace to where `find` sees it; return its path."""
    path = entry / f"{_hash(library.read_bytes())}.so"
    library.replace(path)
    return path


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]
