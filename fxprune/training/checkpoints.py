"""The checkpoint of a run: one file that holds all that the rest of the run depends on.

It is a zip file that torch writes and reads back without running pickled code, with checksums of every part.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.errors import ArtifactError, SpecError, first_line
from fxprune.training.files import replace_file
from fxprune.training.log import LOGS

__all__ = ["check_settings", "claim_folder", "read_checkpoint", "refuse_foreign", "write_checkpoint"]

NAME = "checkpoint.pt"

FORMAT = 1


def claim_folder(folder: Path) -> None:
    """Make the folder of a run. Raises `ArtifactError` when it cannot, or when it has the log of something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot train in '{folder}': {error.strerror}; give a folder you may write") from error
    foreign = [name for name in LOGS if (folder / name).exists()]
    if foreign and not (folder / NAME).exists():
        raise ArtifactError(
            f"'{folder}' has a {foreign[0]} but no {NAME}, so it is no run to resume; give another folder, nothing is "
            "overwritten"
        )


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Put a checkpoint in the place of the last one; a kill at any time leaves one of the two."""
    replace_file(folder / NAME, lambda file: torch.save({"format": FORMAT, **state}, file))


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the checkpoint in a folder, all tensors on the CPU; None where there is none.

    Raises `ArtifactError` when it is damaged or of another version of fxprune.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {broken}")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        raise ArtifactError(
            f"'{path}' is damaged ({first_line(error)}); remove the folder to train anew, or give another one"
        ) from error
    if state.get("format") != FORMAT:
        raise ArtifactError(f"'{path}' was written by another version of fxprune; resume with that one")
    return state


def check_settings(folder: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise `ArtifactError` that lists every setting in which a run differs from the one in the folder."""
    changed = [
        f"{name} was {saved.get(name)!r}, is now {given.get(name)!r}"
        for name in dict.fromkeys((*saved, *given))
        if saved.get(name) != given.get(name)
    ]
    if changed:
        raise ArtifactError(
            f"'{folder}' holds a run with other settings: {'; '.join(changed)}; resume it with the same ones, or give "
            "another folder"
        )


def refuse_foreign(owner: str, state: object) -> None:
    """Raise `SpecError` when a state holds something that a checkpoint cannot give back."""
    for leaf in pytree.tree_leaves(state):
        if leaf is not None and type(leaf) not in (bool, int, float, str, bytes) and not isinstance(leaf, Tensor):
            raise SpecError(
                f"the state of {owner} holds a {type(leaf).__name__}; return tensors, numbers, strings, and lists and "
                "dicts of them"
            )
