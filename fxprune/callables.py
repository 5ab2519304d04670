"""Functions and classes of a file of the user's, named as `path/to/file.py:callable`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fxprune.errors import InputError, nearest

__all__ = ["import_callable"]


def import_callable(name: str, what: str = "a model of your own") -> Callable[..., Any]:
    """Return a callable by the file that defines it; the file is imported as if it were run beside its neighbours.

    Args:
        name: `path/to/file.py:callable`.
        what: it is, for messages.

    Raises `InputError` when there is no such file or callable, or the file cannot be imported.
    """
    file, _, attribute = name.rpartition(":")
    if not file.endswith(".py"):
        raise InputError(f"cannot read '{name}'; {what} is path/to/file.py:callable")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"there is no file '{path}'; {what} is path/to/file.py:callable")
    module = _import_file(path)
    found = getattr(module, attribute, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"'{path}' has no callable '{attribute}'; {nearest(attribute, known)}")
    return found


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fxprune_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As for a script: dataclasses and pickles look their module up, and the file may import its neighbours.
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"'{path}' could not be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module
