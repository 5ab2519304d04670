"""Functions and classes of a file of the user's, named as `path/to/file.py:callable`, and what they raise."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from fxprune.errors import FxpruneError, InputError, first_line, nearest

__all__ = ["blaming", "import_callable"]


def import_callable(name: str, what: str = "a model of your own") -> Callable[..., Any]:
    """Return a callable by the file that defines it; the file is imported as if it were run beside its neighbours.

    All callables of a file are of one module, and its folder stays on `sys.path`: a function may import neighbours when
    it is called. A file that has changed is imported anew.

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
    with blaming(f"'{path}' could not be imported"):
        stat = path.stat()
        module = _import_file(path.resolve(), stat.st_mtime_ns, stat.st_size)
    found = getattr(module, attribute, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"'{path}' has no callable '{attribute}'; {nearest(attribute, known)}")
    return found


@functools.cache
def _import_file(path: Path, *version: int) -> ModuleType:  # noqa: ARG001
    spec = importlib.util.spec_from_file_location(f"fxprune_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As for a script: dataclasses and pickles look their module up, and the file may import its neighbours.
    sys.modules[spec.name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


@contextmanager
def blaming(fact: str, remedy: str = "") -> Iterator[None]:
    """Say of all errors inside that they are the user's to mend; also a decorator, of functions of the user's.

    >>> blaming("the loss failed")(lambda batch: batch["images"])({})
    Traceback (most recent call last):
    fxprune.errors.InputError: the loss failed: KeyError: 'images'
    """
    try:
        yield
    except FxpruneError:
        raise
    except Exception as error:
        raise InputError(f"{fact}: {first_line(error)}{remedy}") from error
