"""What the tables of a recipe are made of: strict fields, paths beside the file, parameters of functions."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, create_model

from fxprune.callables import blaming, import_callable
from fxprune.errors import nearest

__all__ = ["File", "Function", "Name", "Strings", "Table", "a_list", "named", "with_parameters"]


class Table(BaseModel):
    """A table of a recipe: no other keys, no conversions; of some a message says why they are `elsewhere`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    elsewhere: ClassVar[Mapping[str, str]] = {}

    def arguments(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Return the keys that are parameters of a function, with their values; what names a function becomes that.

        Raises `InputError` for a function that cannot be imported. Errors of the function are `InputError` too.
        """
        known = [name for name in inspect.signature(function).parameters if name in type(self).model_fields]
        values = {name: getattr(self, name) for name in known}
        return {name: _imported(name, value) if _names_function(value) else value for name, value in values.items()}


def _imported(option: str, name: str) -> Callable[..., Any]:
    return blaming(f"the {option} '{name}' failed")(import_callable(name, f"a {option}"))


def _names_function(value: object) -> bool:
    return isinstance(value, str) and value.rpartition(":")[0].endswith(".py")


def _beside(file: str, info: ValidationInfo) -> str:
    """Return the path that is meant, absolute: a relative one starts at the recipe's base, which is the context."""
    base = cast(Path, info.context)
    return str((base / Path(file).expanduser()).resolve())


def _name(name: str, info: ValidationInfo) -> str:
    file, _, attribute = name.rpartition(":")
    return f"{_beside(file, info)}:{attribute}" if _names_function(name) else name


def _function(name: str, info: ValidationInfo) -> str:
    if not _names_function(name):
        raise ValueError(f"is '{name}'; give path/to/file.py:callable")
    return _name(name, info)


a_list = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""Lets a tuple be written as TOML has them."""

Strings = Annotated[tuple[str, ...], a_list]
"""A list of strings."""

File = Annotated[str, AfterValidator(_beside)]
"""A path, which becomes absolute."""

Name = Annotated[str, AfterValidator(_name)]
"""A name that others know, or `path/to/file.py:callable`."""

Function = Annotated[str, AfterValidator(_function)]
"""`path/to/file.py:callable`."""


def named(known: Iterable[str]) -> AfterValidator:
    """Return the check that a string is one of the known words, or `path/to/file.py:callable`."""
    words = tuple(known)

    def check(name: str, info: ValidationInfo) -> str:
        if name not in words and not _names_function(name):
            raise ValueError(f"is '{name}'; {nearest(name, words)} Or give path/to/file.py:callable")
        return _name(name, info)

    return AfterValidator(check)


T = TypeVar("T", bound=Table)

_SCALARS = (bool, int, float, str)


def with_parameters(base: type[T], function: Callable[..., Any], leave_out: Collection[str] = ()) -> type[T]:
    """Return `base` with a key for every parameter that a function takes by keyword, or that makes a dataclass.

    Types and defaults are those of the parameters; where None is a value, a recipe says false. What no file can hold,
    such as modules, is to be left out.

    >>> def job(module, *, rate: float = 0.1, limit: int | None = None): ...
    >>> table = with_parameters(Table, job)
    >>> table(limit=False), table(rate=2).arguments(job)
    (job(rate=0.1, limit=None), {'rate': 2.0, 'limit': None})
    """
    is_class = isinstance(function, type)
    fields: dict[str, Any] = {
        one.name: (_in_a_file(one.annotation), ... if one.default is one.empty else one.default)
        for one in inspect.signature(function, eval_str=True).parameters.values()
        if (is_class or one.kind is one.KEYWORD_ONLY) and one.name not in leave_out
    }
    return cast(type[T], create_model(function.__name__, __base__=base, **fields))


def _in_a_file(annotation: Any) -> Any:
    """Return which of the values that a parameter takes a file can hold; functions by their names.

    >>> _in_a_file(int), _in_a_file(str | float)
    (<class 'int'>, str | float)
    """
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = [part for part in parts if part in _SCALARS]
    kinds += [Strings for part in parts if get_args(part) in ((str,), (str, ...))]
    if str in kinds and any(get_origin(part) is Callable for part in parts):
        kinds[kinds.index(str)] = Name
    if not kinds:
        raise TypeError(f"no file can hold a {annotation}; leave the parameter out")
    if NoneType not in parts:
        return functools.reduce(operator.or_, kinds)
    optional = functools.reduce(operator.or_, [*kinds, Literal[False]])
    # From left to right: else 0 would be taken for false.
    as_none = AfterValidator(lambda value: None if value is False else value)
    return Annotated[optional, Field(union_mode="left_to_right"), as_none]
