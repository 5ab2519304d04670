"""What is wrong with a recipe, in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fxprune.errors import nearest
from fxprune.recipes.tables import Table

__all__ = ["explain"]


def explain(error: ValidationError, kind: type[Table], given: Mapping[str, Any]) -> str:
    """Return the first mistake as key, fact and remedy, and how many more there are.

    Unknown keys come first: what is missing may be one of them, misspelled.
    """
    lines: dict[str, str] = {}
    for one in sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden"):
        key, line = _line(one, kind, given)
        lines.setdefault(key, line)
    first, *others = lines.values()
    return first + (f" (and {len(others)} more mistake{'s' * (len(others) > 1)})" if others else "")


def _line(one: Any, kind: type[Table], given: Any) -> tuple[str, str]:
    """Return the dotted key of a mistake, and what to say of it."""
    place = _find(one["loc"], kind, given)
    if one["type"] == "extra_forbidden":
        own = str(one["loc"][-1])
        hint = place.table.elsewhere.get(own) or nearest(own, place.table.model_fields)
        return place.key, f"unknown key {place.key}; {hint}"
    if one["type"] == "value_error":
        return place.key, _joined(place.key, str(one["ctx"]["error"]), place.table)
    fact = (
        "is missing" if one["type"] == "missing" else f"is {json.dumps(place.value, default=str, ensure_ascii=False)}"
    )
    return place.key, f"{place.key} {fact}; give {place.remedy}"


def _joined(key: str, message: str, table: type[Table]) -> str:
    """Put the key before what a check says, which begins with a verb, the key's own name, one in the table, or else."""
    above, _, own = key.rpartition(".")
    first = message.split(maxsplit=1)[0]
    if not key or first in ("is", "has"):
        return f"{key} {message}".lstrip()
    if first == own:
        return f"{above}.{message}".lstrip(".")
    return f"{key}.{message}" if first in table.model_fields else f"{key}: {message}"


@dataclass(frozen=True)
class _Place:
    """A value in a recipe: its dotted key, the table that it is in (or is), what should be there, and the value."""

    key: str
    table: type[Table]
    remedy: str
    value: Any


def _find(loc: tuple[int | str, ...], kind: type[Table], given: Any) -> _Place:
    """Follow a place that pydantic names as far as there are tables; what comes behind are parts of a union."""
    place = _Place("", kind, "", given)
    for part in loc:
        if isinstance(part, int):
            place = replace(place, key=f"{place.key}[{part}]", remedy="a table", value=place.value[part])
            continue
        field = place.table.model_fields.get(part)
        key, value = f"{place.key}.{part}".lstrip("."), place.value.get(part)
        if field is None:
            return replace(place, key=key, value=value)
        table = _table_in(field.annotation)
        place = _Place(key, table or place.table, _described(field), value)
        if table is None:
            return place
    return place


def _table_in(annotation: Any) -> type[Table] | None:
    """Return the kind of table that a field holds, one or a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return annotation
    return next((found for part in get_args(annotation) if (found := _table_in(part)) is not None), None)


_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    NoneType: "",
}


def _described(field: FieldInfo) -> str:
    """Return what a field takes, in words."""
    limits = [f", {limit.ge} or more" for limit in field.metadata if isinstance(limit, annotated_types.Ge)]
    return _in_words(field.annotation) + "".join(limits)


def _in_words(annotation: Any) -> str:
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(filter(None, map(_in_words, parts)))
    if origin is Annotated:
        return _in_words(parts[0])
    if origin is Literal:
        return " or ".join(json.dumps(part) for part in parts)
    if origin is tuple:
        return f"a list of {_in_words(parts[0]).removeprefix('a ')}s"
    return "a table"
