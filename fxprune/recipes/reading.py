"""Read recipes, copy them so that they can be run from anywhere, and tell two of them apart."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.errors import SpecError, UsageError

if TYPE_CHECKING:
    from fxprune.recipes.schema import Recipe

__all__ = ["RecipeFile", "changed_keys", "read_recipe"]


@dataclass(frozen=True)
class RecipeFile:
    """A recipe, the file that it is from, and the text of that."""

    path: Path
    text: str
    recipe: Recipe

    def copy(self) -> str:
        """Return a text that means the same in any folder."""
        if self.recipe.base is not None:
            return self.text
        base = json.dumps(str(self.path.resolve().parent), ensure_ascii=False)
        return f"base = {base}  # where relative paths start\n{self.text}"


def read_recipe(path: str | os.PathLike[str], learn: Callable[..., Any], finetune: Callable[..., Any]) -> RecipeFile:
    """Read and check a recipe, whose tables [learn] and [finetune] have the options of two functions.

    Raises `SpecError` with the first mistake, `UsageError` when the extra `train` is missing.
    """
    try:
        from pydantic import ValidationError

        from fxprune.recipes.mistakes import explain
        from fxprune.recipes.schema import recipe_of
    except ImportError:
        raise UsageError("recipes need the extra: pip install 'fxprune[train]'") from None
    place = Path(path).expanduser()
    text = _text(place)
    given = _tables(place, text)
    kind = recipe_of(learn, finetune)
    base = given.get("base")
    if base is not None and not (isinstance(base, str) and Path(base).is_absolute()):
        raise SpecError(
            f"'{path}': base is {base!r}; give an absolute path, or leave it out for the recipe's own folder"
        )
    try:
        recipe = kind.model_validate(given, context=Path(base or place.resolve().parent))
    except ValidationError as error:
        raise SpecError(f"'{path}': {explain(error, kind, given)}") from None
    return RecipeFile(place, text, recipe)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SpecError(f"there is no recipe '{path}'; give a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        fact = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SpecError(f"cannot read the recipe '{path}': {fact}; give a TOML file") from None


def _tables(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"'{path}' is no TOML: {error}; strings need quotes, tables [brackets]") from None


def changed_keys(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys in which two recipes differ, with both values; where paths start is none of them."""
    first, second = (dict(_flat(recipe.model_dump(mode="json", exclude={"base"}))) for recipe in (before, now))
    return {
        key: (first.get(key), second.get(key))
        for key in dict.fromkeys((*first, *second))
        if first.get(key) != second.get(key)
    }


def _flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
