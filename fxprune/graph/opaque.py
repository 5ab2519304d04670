"""Which callable defeats symbolic tracing, and how tracing goes on without it.

The traceback of a failure says who called whom. The smallest callable that can stand for the failure becomes an
opaque leaf, and the model is traced again:

1. A module that holds no parameters, since nothing in it could be pruned; the outermost such one.
2. A function or method that the failing module's `forward` calls, the outermost that works on its own: it may not
   need parameters other than those that it is given.
3. The module itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType, FunctionType, TracebackType
from typing import Any

from torch import nn

from fxprune.errors import first_line

__all__ = ["Opaque", "OpaqueCallable"]


@dataclass(frozen=True)
class OpaqueCallable:
    """A function that is not traced into: where it is held under its name, and whether it takes its owner first."""

    function: FunctionType
    holders: tuple[Any, ...]
    is_method: bool


@dataclass
class Opaque:
    """What is not traced into: `modules` path → reason, and `functions`."""

    modules: dict[str, str] = field(default_factory=dict)
    functions: dict[CodeType, OpaqueCallable] = field(default_factory=dict)
    reasons: dict[CodeType, str] = field(default_factory=dict)
    refused: set[CodeType] = field(default_factory=set)

    def add_culprit(self, error: Exception, root: nn.Module) -> bool:
        """Make the callable opaque that `error` came from; whether there was one that is not opaque yet."""
        names = {id(module): name for name, module in root.named_modules()}
        frames = list(_frames(error.__traceback__))
        running = [names.get(id(_forwarding(frame))) for frame in frames]
        path = [name for name in running if name is not None]
        last = max((i for i, name in enumerate(running) if name is not None), default=-1)
        reason = first_line(error)
        stateless = [name for name in path if name and not root.get_submodule(name).state_dict()]
        return (
            self._add_module(stateless[:1], reason)  # 1.
            or self._add_function(zip(frames[max(last, 0) :], frames[last + 1 :], strict=False), reason)  # 2.
            or self._add_module(path[-1:], reason)  # 3.
        )

    def _add_module(self, names: list[str], reason: str) -> bool:
        for name in names:
            if name and name not in self.modules:
                self.modules[name] = reason
                return True
        return False

    def _add_function(self, calls: Iterable[tuple[FrameType, FrameType]], reason: str) -> bool:
        """Make the outermost of nested calls, pairs (caller, callee), opaque that was not tried before."""
        for caller, frame in calls:
            code, found = frame.f_code, _callable_of(frame, caller)
            if found is not None and code not in self.refused and code not in self.functions:
                self.functions[code] = found
                self.reasons[code] = reason
                return True
        return False

    def refuse(self, code: CodeType) -> None:
        """Note that a function does not work on its own; it is traced into again."""
        self.refused.add(code)
        self.functions.pop(code)

    @contextmanager
    def instead(self, record: Callable[[OpaqueCallable, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        """While inside, calls of the opaque functions go to `record`."""
        replaced: list[tuple[Any, str, Any]] = []
        try:
            for known in self.functions.values():
                for holder in known.holders:
                    name = known.function.__name__
                    replaced.append((holder, name, known.function))
                    setattr(holder, name, _recorded(known, record))
            yield
        finally:
            for holder, name, function in reversed(replaced):
                setattr(holder, name, function)


def _recorded(
    known: OpaqueCallable, record: Callable[[OpaqueCallable, tuple[Any, ...], dict[str, Any]], Any]
) -> Callable[..., Any]:
    return lambda *args, **kwargs: record(known, args, kwargs)


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    """Yield the frames of a traceback from the outermost on.

    Those of this package are left out, and of torch all but the forwards of its modules.
    """
    while traceback is not None:
        home = traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        if home not in ("torch", "fxprune") or _forwarding(traceback.tb_frame) is not None:
            yield traceback.tb_frame
        traceback = traceback.tb_next


def _forwarding(frame: FrameType) -> nn.Module | None:
    """Return the module whose forward this frame runs."""
    names = frame.f_code.co_varnames
    owner = frame.f_locals.get(names[0]) if names else None
    forward = getattr(type(owner), "forward", None)
    is_forward = isinstance(owner, nn.Module) and getattr(forward, "__code__", None) is frame.f_code
    return owner if is_forward else None


def _callable_of(frame: FrameType, caller: FrameType) -> OpaqueCallable | None:
    """Find the function that a frame runs, and everywhere that its callers look it up."""
    code = frame.f_code
    owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    for kind in type(owner).__mro__ if owner is not None else ():
        found = vars(kind).get(code.co_name)
        if isinstance(found, FunctionType) and found.__code__ is code:
            return OpaqueCallable(found, (kind,), is_method=True)
    modules = [sys.modules.get(f.f_globals.get("__name__", "")) for f in (frame, caller)]
    holders = [m for m in dict.fromkeys(modules) if getattr(getattr(m, code.co_name, None), "__code__", None) is code]
    if not holders:
        return None
    return OpaqueCallable(getattr(holders[0], code.co_name), tuple(holders), is_method=False)
