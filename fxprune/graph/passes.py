"""What a pass is, and how a pipeline runs, verifies and spells passes."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.errors import FxpruneError, SpecError, VerifyError, nearest
from fxprune.graph.dump import dump
from fxprune.graph.verify import output_shapes, verify

__all__ = ["Observer", "Pass", "PassEvent", "Pipeline", "changes", "parse_spec", "print_changes"]


@dataclass(frozen=True)
class Pass:
    """Base of all passes: a frozen dataclass whose fields are its options.

    A subclass writes `rewrite`, which edits the module in place and says whether it changed anything, and documents
    the rewrite, before → after; one that runs the module calls `module.recompile()` first. Calling a pass returns
    torch's own `PassResult`, so it also runs in torch's `PassManager`.
    """

    name: ClassVar[str]

    def rewrite(self, module: fx.GraphModule) -> bool:
        """Edit `module` in place; return whether anything changed."""
        raise NotImplementedError

    def __call__(self, module: fx.GraphModule) -> PassResult:
        """Run the pass in place."""
        changed = self.rewrite(module)
        if changed:
            module.recompile()
        return PassResult(module, changed)

    def __str__(self) -> str:
        """Spell the pass with the options that differ from their defaults: `channel-selection{macs=50%}`.

        Raises `SpecError` for an option that no spec can give, such as a function.
        """
        return self._spelled(_spell)

    def record(self) -> str:
        """Spell the pass for a plan: functions by their names, options by layer as "by-layer", no data."""
        return self._spelled(_name)

    def _spelled(self, spell: Callable[[Pass, str, Any], str]) -> str:
        options = [
            f"{field.name}={spell(self, field.name, value)}"
            for field in dataclasses.fields(self)
            if field.compare and (value := getattr(self, field.name)) != field.default
        ]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


def _spell(step: Pass, option: str, value: Any) -> str:
    if isinstance(value, tuple):
        return "|".join(_spell(step, option, v) for v in value)
    if isinstance(value, (bool, int, float, str)):
        return str(value)
    kind = type(value).__name__
    raise SpecError(f"option '{option}' of pass '{step.name}' is a {kind}, which has no spelling in a spec")


def _name(step: Pass, option: str, value: Any) -> str:
    if callable(value):
        return getattr(value, "__name__", "callable")
    return "by-layer" if isinstance(value, Mapping) else _spell(step, option, value)


@dataclass(frozen=True)
class PassEvent:
    """What an observer is told after each pass; `before` is the dump before it."""

    name: str
    module: fx.GraphModule
    before: str
    modified: bool
    seconds: float


Observer = Callable[[PassEvent], None]


def changes(event: PassEvent) -> str:
    """Return what a pass changed: its name and time, and the unified diff of the dumps before and after."""
    head = f"--- {event.name}: {event.seconds:.3f} s{'' if event.modified else ', nothing changed'}"
    lines = difflib.unified_diff(event.before.splitlines(), dump(event.module).splitlines(), lineterm="", n=0)
    return "\n".join([head, *list(lines)[2:]])


def print_changes(event: PassEvent) -> None:
    """Observer: print what each pass changed."""
    print(changes(event))  # noqa: T201


@dataclass(frozen=True)
class Pipeline:
    """Runs passes in order on a copy of the module and verifies the graph after each.

    `str(pipeline)` is a spec that `parse_spec` reads back.
    """

    passes: tuple[Pass, ...]
    observers: tuple[Observer, ...] = ()

    def __call__(self, module: fx.GraphModule) -> PassResult:
        """Return the rewritten copy; `module` stays as it is, also when a pass fails.

        Raises whatever mistake of the caller a pass reports, and `VerifyError` when a pass breaks the graph.
        """
        done = list(self.steps(module))
        copied = done[-1][1] if done else copy.deepcopy(module)
        return PassResult(copied, any(changed for _, _, changed in done))

    def steps(self, module: fx.GraphModule) -> Iterator[tuple[Pass, fx.GraphModule, bool]]:
        """Rewrite a copy of `module`; yield (pass, copy, whether it changed anything) after every pass.

        The copy shares tensors with `module` until the last pass is done, and its Python code is generated then, or
        after every pass where there are observers, who may want to run it.
        """
        copied = _copy_structure(module)
        for step in self.passes:
            yield step, copied, self._run(step, copied)
        copied.recompile()
        _own_tensors(copied, module)

    def _run(self, step: Pass, module: fx.GraphModule) -> bool:
        before = dump(module) if self.observers else ""
        outputs = output_shapes(module)
        start = time.perf_counter()
        try:
            modified = step.rewrite(module)
        except FxpruneError:
            raise
        except Exception as error:
            raise VerifyError(f"pass '{step.name}' failed: {type(error).__name__}: {error}") from error
        if modified:
            verify(module, step.name, outputs)
        if self.observers:
            module.recompile()
        for observe in self.observers:
            observe(PassEvent(str(step.name), module, before, modified, time.perf_counter() - start))
        return modified

    def __str__(self) -> str:
        return ",".join(str(step) for step in self.passes)


def _copy_structure(module: fx.GraphModule) -> fx.GraphModule:
    """Copy graph and modules but share tensors and attributes: passes assign them and never write into them."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    parts = list(module.modules())[1:]
    memo.update((id(part), _copy_module(part)) for part in parts)
    for part in parts:
        for name, child in part._modules.items():
            memo[id(part)]._modules[name] = memo.get(id(child))
    return copy.deepcopy(module, memo)


def _copy_module(module: nn.Module) -> nn.Module:
    """Copy one module with the dicts that it keeps its state in, but not its children."""
    copied = type(module).__new__(type(module))
    attributes = {name: dict(value) if type(value) is dict else value for name, value in module.__dict__.items()}
    copied.__dict__.update(attributes)
    return copied


def _own_tensors(module: fx.GraphModule, other: fx.GraphModule) -> None:
    """Copy the tensors that `module` still shares with `other`; tied tensors stay tied."""
    shared = {id(tensor) for tensor in (*other.parameters(), *other.buffers())}
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) in shared:
                    held[name] = copies.setdefault(id(tensor), copy.deepcopy(tensor))  # type: ignore[assignment]


_PASS = re.compile(r"\s*([\w-]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


def parse_spec(spec: str, known: Sequence[type[Pass]]) -> tuple[Pass, ...]:
    """Read passes from a spec string, the inverse of `str(pipeline)`.

    Raises `SpecError` naming the pass or option that does not exist and the nearest that does.
    """
    by_name = {kind.name: kind for kind in known}
    passes, position = [], 0
    while position < len(spec):
        match = _PASS.match(spec, position)
        if match is None:
            raise SpecError(
                f"cannot read the pass spec at '{spec[position:]}'; write name{{option=value,…}} separated by commas"
            )
        name, options = match.group(1).replace("_", "-"), match.group(2) or ""
        if name not in by_name:
            raise SpecError(f"unknown pass '{name}'; {nearest(name, by_name)}")
        passes.append(_build(by_name[name], options))
        position = match.end()
    if not passes:
        raise SpecError(f"the pass spec is empty; known passes: {', '.join(by_name)}")
    return tuple(passes)


def _build(kind: type[Pass], options: str) -> Pass:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    given: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in options.split(","))):
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        if key not in fields or not equals:
            raise SpecError(f"pass '{kind.name}' has no option '{key}'; {nearest(key, fields)}")
        given[key] = _read(str(fields[key].type), value.strip())
    return kind(**given)


def _read(annotation: str, text: str) -> Any:
    if annotation.startswith("tuple"):
        return tuple(filter(None, text.split("|")))
    if annotation == "bool":
        return text.lower() in ("true", "1", "yes")
    return _number(text)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
