"""The trace of a run: networks of growing sparsity on disk, of which one is chosen afterwards.

A folder holds one safetensors file per checkpoint and `trace.json`, the index. Every file is a state_dict by the names
of the plain model, with zeros for what is pruned, so that `fxprune.checkpoint.load_checkpoint` reads it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxprune.errors import ArtifactError, TargetError, first_line, nearest
from fxprune.training.files import replace_file

__all__ = ["Checkpoint", "Trace"]

_INDEX, _SCHEMA = "trace.json", 1
_FACTS = ("step", "epoch", "sparsity", "layers", "measures")


@dataclass(frozen=True)
class Checkpoint:
    """One network of a trace: where it is and what was measured of it, hard-pruned.

    `step` is the optimizer step after which it was written. `sparsity` is the part of the prunable weights that is
    zero, `layers` the same by the weight's name.
    """

    path: Path
    step: int
    epoch: int
    sparsity: float
    layers: Mapping[str, float]
    measures: Mapping[str, float]

    def masks(self) -> dict[str, Tensor]:
        """Return which weights are kept, bool by the weight's name. A kept weight is never zero (w² > τ ≥ 0).

        Raises `ArtifactError` when the file is absent or damaged.
        """
        try:
            with safe_open(self.path, "pt") as file:
                return {name: file.get_tensor(name) != 0 for name in self.layers}
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"checkpoint '{self.path}' cannot be read: {first_line(error)}") from None


@dataclass(frozen=True)
class Trace:
    """The checkpoints of a run in the order of training; `run` tells runs apart."""

    folder: Path
    run: str = ""
    checkpoints: tuple[Checkpoint, ...] = ()

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Trace:
        """Read the index of a folder; a folder without one is an empty trace.

        Raises `ArtifactError` for an index that cannot be read.
        """
        place = Path(folder)
        try:
            return _read_index(place)
        except FileNotFoundError:
            return cls(place)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ArtifactError(f"'{place / _INDEX}' is not the index of a trace: {first_line(error)}") from None

    def at(self, sparsity: float) -> Checkpoint:
        """Return the least sparse checkpoint of at least this sparsity; the latest of equals.

        Raises `TargetError` where none is that sparse.
        """
        enough = [one for one in self.checkpoints if one.sparsity >= sparsity]
        if not enough:
            reached = max((one.sparsity for one in self.checkpoints), default=0.0)
            raise TargetError(
                f"no checkpoint of '{self.folder}' has a sparsity of {sparsity:g}; the highest is {reached:.4f}. Ask "
                "for less, train for longer or with a larger regularization"
            )
        return min(reversed(enough), key=lambda one: one.sparsity)

    def at_least(self, **measures: float) -> Checkpoint:
        """Return the sparsest checkpoint that measures at least this: `trace.at_least(accuracy=0.9)`.

        Raises `TargetError` where none does, or where that was not measured.
        """
        for name in measures:
            for one in self.checkpoints:
                if name not in one.measures:
                    raise TargetError(f"'{self.folder}' holds no measure '{name}'; {nearest(name, one.measures)}")
        good = [one for one in self.checkpoints if all(one.measures[name] >= v for name, v in measures.items())]
        if not good:
            best = {name: max((one.measures[name] for one in self.checkpoints), default=math.nan) for name in measures}
            wanted, found = (", ".join(f"{name} {v:g}" for name, v in some.items()) for some in (measures, best))
            raise TargetError(f"no checkpoint of '{self.folder}' reaches {wanted}; the best are {found}")
        return max(good, key=lambda one: one.sparsity)

    def until(self, step: int) -> Trace:
        """Return the trace as it was after a step; nothing changes on disk before the next `add`."""
        return replace(self, checkpoints=tuple(one for one in self.checkpoints if one.step <= step))

    def add(self, checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Trace:
        """Return the trace with one more checkpoint; the folder holds just that then.

        Files are written aside and renamed, the index last: a process that is killed leaves the trace as it was.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot make the folder '{self.folder}': {error.strerror}") from error
        before = {one.path for one in Trace.read(self.folder).checkpoints}
        extended = replace(self, checkpoints=(*self.checkpoints, checkpoint))
        _write_state(checkpoint.path, state)
        _write_index(extended)
        for path in before - {one.path for one in extended.checkpoints}:
            path.unlink(missing_ok=True)
        return extended


def _write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    # Tied tensors share memory, which the format refuses.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    replace_file(path, lambda file: file.write(content))


def _write_index(trace: Trace) -> None:
    rows = [{"file": one.path.name, **{name: getattr(one, name) for name in _FACTS}} for one in trace.checkpoints]
    text = json.dumps({"schema": _SCHEMA, "run": trace.run, "checkpoints": rows}, indent=1)
    replace_file(trace.folder / _INDEX, lambda file: file.write(text.encode() + b"\n"))


def _read_index(folder: Path) -> Trace:
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    if index["schema"] != _SCHEMA:
        raise ValueError(f"schema {index['schema']}, this fxprune reads {_SCHEMA}")
    rows = [Checkpoint(folder / row["file"], **{name: row[name] for name in _FACTS}) for row in index["checkpoints"]]
    return Trace(folder, str(index["run"]), tuple(rows))
