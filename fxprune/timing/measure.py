"""Make every variant ready, see that it computes what the model does, and time all in alternation."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxprune.errors import first_line
from fxprune.graph.inputs import Inputs
from fxprune.graph.tracing import trace
from fxprune.latency import Times, barrier, check_runs, time_in_turn, with_threads
from fxprune.machine import this_machine
from fxprune.timing.agreement import Agreement, agreement, tensors_of
from fxprune.timing.comparison import Comparison, VariantTimes
from fxprune.timing.layers import LayerTimer
from fxprune.timing.subject import CONTIGUOUS, Subject
from fxprune.timing.variants import Call, Variant

__all__ = ["AUTO", "Measurement", "compare"]

AUTO = "auto"
"""The faster memory format of each variant."""

_STOLEN = 0.1
"""Share of the time without the processor that is worth a note."""

_SETTLE = 1
"""Runs of a variant right before each timed one."""

_PACKAGES = ("fxprune", "torch", "onnxruntime", "openvino")

_ALIKE = 0.01
"""Outputs in float32 that differ by more are not those of the same computation."""

_NOISY = 0.2
"""Quartiles that are further apart, as a share of the median, tell more of the machine than of the variant."""


@dataclass(frozen=True)
class Measurement:
    """How to measure.

    Attributes:
        runs: timed runs of every variant, and of every graph whose layers are timed.
        warmup: runs before those.
        memory_format: "contiguous", "channels-last", or "auto" for the faster of each variant.
        layers: whether to time the layers of graphs.
        frontend: how the eager model is traced for that.
        is_lowered: whether a module is one that lowering made.
        progress: called after every variant that was made ready, and after the runs.
    """

    runs: int
    warmup: int
    memory_format: str
    layers: bool
    frontend: str
    is_lowered: Callable[[nn.Module], bool]
    progress: Callable[[], None]

    @property
    def timed(self) -> slice:
        """Which runs of a layer timer are timed ones."""
        return slice(self.warmup + _SETTLE, None, _SETTLE + 1)


@dataclass(frozen=True)
class _Ready:
    """A variant that runs here, the memory format that is kept, and how its outputs agree."""

    variant: Variant
    memory_format: str
    call: Call
    agreement: Agreement


def compare(name: str, subject: Subject, variants: Sequence[Variant], how: Measurement) -> Comparison:
    """Compare variants of a model that is called `name`.

    A variant that cannot run here has its reason in its row. Raises `InputError` where the model itself does not run.
    """
    check_runs(how.runs, how.warmup)
    with with_threads(subject.threads):
        notes = list(_unusual(subject))
        rows = [_prepared(subject, variant, how) for variant in variants]
        ready = [row for row in rows if isinstance(row, _Ready)]
        timers, untimed = _layer_timers(subject, ready, how.frontend) if how.layers else ((), ())
        with _watched(notes):
            times = _in_turn(subject, ready, timers, how)
    how.progress()
    found = tuple(_timed(row, times[row.variant.name]) if isinstance(row, _Ready) else row for row in rows)
    made = {name for row in ready for name in _lowered_layers(row.call.module, how.is_lowered)}
    layers = tuple(timer.times(how.timed, made) for timer in timers)
    notes += [*untimed, *_doubts(ready), *_noise({row.variant: row.times for row in found if row.times})]
    return Comparison(name, subject.threads, how.runs, how.warmup, this_machine(_PACKAGES), found, layers, tuple(notes))


@contextmanager
def _watched(notes: list[str]) -> Iterator[None]:
    """Note it where this process did not get the processor all the time: medians are too long then, however alike."""
    wall, own = time.perf_counter(), time.process_time()
    yield
    wall, own = time.perf_counter() - wall, time.process_time() - own
    if own < (1 - _STOLEN) * wall:
        notes.append(f"other processes had the processor {1 - own / wall:.0%} of the time: these times are too long")


def _in_turn(subject: Subject, ready: list[_Ready], timers: Sequence[LayerTimer], how: Measurement) -> dict[str, Times]:
    """Time the variants, and node by node their graphs, in the same rounds."""
    calls = {row.variant.name: row.call.run for row in ready}
    calls |= {f"layers of {timer.variant}": timer.run for timer in timers}
    for timer in timers:
        timer.stopwatch.taken.clear()
    return time_in_turn(calls, runs=how.runs, warmup=how.warmup, settle=_SETTLE, wait=barrier(subject.inputs))


def _timed(row: _Ready, times: Times) -> VariantTimes:
    return VariantTimes(row.variant.name, row.memory_format, times, row.agreement, row.call.remark)


def _prepared(subject: Subject, variant: Variant, how: Measurement) -> _Ready | VariantTimes:
    """Make a variant ready in every memory format worth trying and keep the fastest; or say why it cannot run here."""
    ready: list[_Ready] = []
    reason = ""
    for memory_format in _memory_formats(subject, variant, how.memory_format):
        try:
            ready.append(_made(subject, variant, memory_format))
        except Exception as error:  # whatever a compiler or an engine raises
            reason = reason or first_line(error)
    how.progress()
    return _fastest(ready, barrier(subject.inputs)) if ready else VariantTimes(variant.name, reason=reason)


def _memory_formats(subject: Subject, variant: Variant, wanted: str) -> tuple[str, ...]:
    if variant.memory_formats is None or not subject.has_images:
        return (CONTIGUOUS,)
    return variant.memory_formats if wanted == AUTO else (wanted,)


@torch.no_grad()
def _made(subject: Subject, variant: Variant, memory_format: str) -> _Ready:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call = variant.make(subject, memory_format)
        return _Ready(variant, memory_format, call, agreement(tensors_of(call.run()), subject.expected))


def _fastest(ready: list[_Ready], wait: Callable[[], None]) -> _Ready:
    if len(ready) == 1:
        return ready[0]
    calls = {row.memory_format: row.call.run for row in ready}
    times = time_in_turn(calls, runs=5, warmup=2, settle=_SETTLE, wait=wait)
    return min(ready, key=lambda row: times[row.memory_format].median)


@torch.no_grad()
def _layer_timers(
    subject: Subject, ready: list[_Ready], frontend: str
) -> tuple[tuple[LayerTimer, ...], tuple[str, ...]]:
    """Return what times the layers of every graph, and why others are not timed."""
    timers, untimed = [], []
    for row in ready:
        if row.call.module is None:
            continue
        inputs = subject.inputs_as(row.memory_format)
        try:
            timer = LayerTimer(row.variant.name, _graph_of(row.call.module, inputs, frontend), inputs)
            timer.run()
        except Exception as error:  # a graph from elsewhere may hold anything
            untimed.append(f"the layers of '{row.variant.name}' are not timed: {first_line(error)}")
        else:
            timers.append(timer)
    return tuple(timers), tuple(untimed)


def _graph_of(module: nn.Module, inputs: Inputs, frontend: str) -> fx.GraphModule:
    return module if isinstance(module, fx.GraphModule) else trace(module, inputs, frontend=frontend)


def _lowered_layers(module: nn.Module | None, is_lowered: Callable[[nn.Module], bool]) -> list[str]:
    return [] if module is None else [path for path, part in module.named_modules() if is_lowered(part)]


def _unusual(subject: Subject) -> Iterator[str]:
    """Say what makes the comparison weaker than it looks. Raises `InputError` where the model does not run."""
    if not all(bool(output.isfinite().all()) for output in subject.expected):
        yield "the eager model's outputs are not all finite; only the others are compared"
    cores = this_machine(()).cores
    if subject.threads > cores:
        yield f"{subject.threads} threads share {cores} core{'s' * (cores != 1)}"


def _doubts(ready: list[_Ready]) -> Iterator[str]:
    """Name the variants that seem to compute something else than the model."""
    for row in ready:
        difference = row.agreement.difference
        if row.variant.computes_alike and not difference <= _ALIKE:
            yield f"'{row.variant.name}' computes something else than the model: outputs differ by {difference:.1%}"


def _noise(times: Mapping[str, Times]) -> Iterator[str]:
    noisy = [f"'{name}' ({taken.spread:.0%})" for name, taken in times.items() if taken.spread > _NOISY]
    if noisy:
        yield f"quartiles far apart: {', '.join(noisy)} of the median; stop what else runs, or take more runs"
