"""The folder of a run: the recipe that it is of, and what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fxprune.errors import ArtifactError, first_line
from fxprune.insights.widths import StageWidth
from fxprune.recipes.reading import RecipeFile, changed_keys
from fxprune.training.checkpoints import NAME
from fxprune.training.files import replace_file

__all__ = ["RECIPE", "SUMMARY", "Summary", "check_folder", "claim_folder", "has_begun"]

RECIPE, SUMMARY = "recipe.toml", "summary.json"


@dataclass(frozen=True)
class Summary:
    """What a recipe made.

    Attributes:
        target: MACs to leave, as the recipe has it.
        macs: multiply-accumulates before and after.
        parameters: those before and after.
        measures: means over the validation data, by stage; none without such data.
        stages: the widths of layers, resolution by resolution.
        seconds: wall time of training and validation, by stage, also of parts that ran before a kill.
        versions: of what it was made with.
    """

    target: float | str
    macs: tuple[int, int]
    parameters: tuple[int, int]
    stages: Sequence[StageWidth]
    measures: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]

    def to_json(self) -> str:
        """Return the summary as JSON; numbers that JSON lacks are null."""
        finite = {
            stage: {name: value if math.isfinite(value) else None for name, value in row.items()}
            for stage, row in self.measures.items()
        }
        return json.dumps(asdict(self) | {"measures": finite}, indent=2) + "\n"

    def write(self, folder: Path) -> None:
        """Put the summary into the folder of its run, which is finished with that."""
        replace_file(folder / SUMMARY, lambda file: file.write(self.to_json().encode()))

    @classmethod
    def read(cls, folder: Path) -> Summary | None:
        """Read what a finished run came to; None where it is not finished. Raises `ArtifactError` for a damaged one."""
        path = folder / SUMMARY
        if not path.exists():
            return None
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            pairs = {name: (facts[name][0], facts[name][1]) for name in ("macs", "parameters")}
            rows = {
                stage: {name: math.nan if value is None else value for name, value in row.items()}
                for stage, row in facts["measures"].items()
            }
            stages = tuple(StageWidth(**row | {"channels": tuple(row["channels"])}) for row in facts["stages"])
            return cls(**facts | pairs | {"measures": rows, "stages": stages})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ArtifactError(
                f"'{path}' is not the summary of a run ({first_line(error)}); remove it, and the recipe run again "
                "writes it"
            ) from None


def check_folder(folder: Path, file: RecipeFile, read: Callable[[Path], RecipeFile]) -> None:
    """Raise `ArtifactError` unless the folder is new or holds a run of the same recipe.

    Before the run is finished, what [output] says may change.
    """
    if not folder.exists() or (folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())):
        return
    if not (folder / RECIPE).exists():
        fact = f"is not empty and has no {RECIPE}" if folder.is_dir() else "is a file"
        raise ArtifactError(f"'{folder}' {fact}; give a new folder, or one of a run to go on with")
    before = read(folder / RECIPE).recipe
    if before.base is None:
        raise ArtifactError(f"'{folder}' has a {RECIPE} that no run put there; give a new folder")
    changed = changed_keys(before, file.recipe)
    is_finished = (folder / SUMMARY).exists()
    shown = [
        f"{key} was {json.dumps(then)}, is now {json.dumps(now)}"
        for key, (then, now) in changed.items()
        if is_finished or not key.startswith("output.")
    ]
    if shown:
        more = f", and {len(shown) - _MOST} more" if len(shown) > _MOST else ""
        remedy = "go on with the same one, or give another folder"
        if all(key.startswith("output.") for key in changed):
            remedy = f"remove '{folder / SUMMARY}', and the run started again writes its outputs anew"
        raise ArtifactError(f"'{folder}' holds a run of another recipe: {'; '.join(shown[:_MOST])}{more}; {remedy}")


_MOST = 4
"""Changes that a message names."""


def has_begun(folder: Path) -> bool:
    """Whether a folder holds a run that has begun to learn."""
    return (folder / "learn" / NAME).exists()


def claim_folder(folder: Path, file: RecipeFile) -> None:
    """Make the folder of a run and put the recipe there. Raises `ArtifactError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot make the folder '{folder}': {error.strerror}; give one you may write") from error
    replace_file(folder / RECIPE, lambda to: to.write(file.copy().encode()))
