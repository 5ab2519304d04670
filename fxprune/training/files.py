"""Files that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import contextlib
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
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        # torch.save says of a full disk that a position is not what it expected.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise ArtifactError(f"cannot write '{path}': {cause.strerror or cause}") from error
