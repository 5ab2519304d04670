"""Every exception of fxprune's own.

`UsageError` and its children are the user's to mend: each message names the subject, the fact and the remedy.
`VerifyError` is ours: a pass broke a promise, and the message carries what is needed to report it.
`BuildError` is the machine's, and seldom seen: other backends stand in. The quantised layers and their storage, which
models carry with them, refuse impossible values with `ValueError`, as torch does.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "BuildError",
    "DataDependentError",
    "FxpruneError",
    "InputError",
    "PlanError",
    "SpecError",
    "TargetError",
    "TraceError",
    "UsageError",
    "VerifyError",
    "first_line",
    "nearest",
]


class FxpruneError(Exception):
    """Base of all exceptions of fxprune."""


class UsageError(FxpruneError):
    """A mistake of the caller, with its remedy."""


class InputError(UsageError):
    """The model or its example inputs cannot be worked on."""


class TraceError(UsageError):
    """No front end could turn the model into a graph."""


class TargetError(UsageError):
    """A pruning target or constraint that cannot be met."""


class SpecError(UsageError):
    """A pass spec string, pass name, option or criterion that does not exist or does not parse."""


class PlanError(UsageError):
    """A plan that is malformed or belongs to another model."""


class ArtifactError(UsageError):
    """A folder of a saved artifact that cannot be written or read."""


class VerifyError(FxpruneError):
    """A pass produced a graph that breaks its promises: a defect of fxprune, not of the caller."""


class BuildError(FxpruneError):
    """The native kernels cannot be compiled or loaded here: the reason and the remedy, on one line.

    Attributes:
        output: all that the compiler wrote, where it was the compiler.
    """

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(" ".join(reason.split()))
        self.output = output


class DataDependentError(FxpruneError):
    """Control flow asked for something that depends on the inputs' data; tracing goes around it."""


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error; those of fxprune speak for themselves.

    >>> first_line(KeyError("x")), first_line(InputError("no model"))
    ("KeyError: 'x'", 'no model')
    """
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, FxpruneError) else f"{type(error).__name__}: {text}".strip()


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the known word closest to `name`, or lists all when none is close.

    >>> nearest("conv", ["conv1", "linear"])
    "did you mean 'conv1'?"
    >>> nearest("zzz", ["conv1", "linear"])
    'known: conv1, linear'
    """
    words = list(known)
    close = difflib.get_close_matches(name, words, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    shown = ", ".join(words[:20])
    return f"known: {shown}" + (", …" if len(words) > 20 else "")
