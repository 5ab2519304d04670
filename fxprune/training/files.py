"""Files that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fxprune.errors import ArtifactError

__all__ = ["replace_file"]


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file aside, then rename it to `path`. Raises `ArtifactError` where that cannot be done."""
    aside = path.with_name(f".{path.name}.aside")
    try:
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write '{path}': {error.strerror or error}") from error
