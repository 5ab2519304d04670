"""Files are whole or absent, also where the disk is full."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fxprune.errors import ArtifactError
from fxprune.training.files import replace_file


@contextmanager
def _full_disk() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_last_file_alone(tmp_path: Path) -> None:
    """Torch says RuntimeError where the system says that there is no room."""
    path = tmp_path / "file"
    path.write_bytes(b"last")
    for write in (lambda file: file.write(bytes(10_000)), lambda file: torch.save(torch.zeros(10_000), file)):
        with _full_disk(), pytest.raises(ArtifactError, match=r"cannot write '.*file': File too large"):
            replace_file(path, write)
        assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("file", b"last")]


def test_a_defect_while_writing_is_no_matter_of_the_disk(tmp_path: Path) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("defect")

    with pytest.raises(RuntimeError, match="defect"):
        replace_file(tmp_path / "file", broken)
    assert not list(tmp_path.iterdir())
