"""Measure one model with one tool, in a process that may be killed: `python -m benchmarks.one_model SUITE NAME TOOL`.

Every finding is printed as a line of JSON as soon as it is known, so that what was measured before an end by force is
not lost. The last line has the outcome: ok, refused, wrong or crashed.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import psutil
import torch
from torch import nn

import fxprune
from benchmarks.jobs import count_macs, prune_by_peer
from benchmarks.laws import check_laws
from benchmarks.suites import build, inputs_for_laws, is_data_dependent
from fxprune import Inputs, Result
from fxprune.cost import CostModel
from fxprune.errors import TargetError, UsageError
from fxprune.graph.facts import trace_facts
from fxprune.graph.passes import PassEvent
from fxprune.selection import Constraints, eligible_orbits

__all__: list[str] = []

REPEATS = 3

TARGETS: Mapping[str, Mapping[str, Any]] = {
    "half exactly": {"macs": "50%"},
    "half with statistical": {"macs": "50%", "allow_statistical": True},
    "ratio 30%": {"ratio": "30%", "allow_statistical": True},
}
"""What a model is pruned to: the first of these that it reaches."""

PEER_RATIOS = (0.3, 0.5)
"""Torch-Pruning's ratios: the second where the first leaves more than `ENOUGH`."""

ENOUGH = 0.55


def say(**findings: Any) -> None:
    """Print findings, one JSON object a line; None is no finding."""
    print(json.dumps({name: value for name, value in findings.items() if value is not None}), flush=True)


class PeakMemory:
    """Samples this process's resident memory while a block runs; `added` is the peak above the start, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.added = 0
        self._process = psutil.Process()
        release_memory()
        self._start = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.added = max(self.added, self._process.memory_info().rss - self._start)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def release_memory() -> None:
    """Give freed memory back to the system, where its C library can, so that its reuse is seen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def timed(job: Callable[..., object], *args: Any, **options: Any) -> float:
    """Return the seconds that a call takes."""
    gc.collect()
    start = time.perf_counter()
    job(*args, **options)
    return time.perf_counter() - start


def measure_fxprune(suite: str, name: str) -> None:
    """Say what a pruning job does to a model and what it takes, then check the laws on the model built anew."""
    macs = measure_pruning(suite, name)
    release_memory()
    say(stage="laws")
    say(**describe_laws(suite, name, macs))


def measure_pruning(suite: str, name: str) -> int:
    """Prune a model, say what could leave and what it took; return the MACs of the whole model."""
    model, inputs = describe_subject(suite, name)
    load_lazy_imports()
    say(stage="prune")
    with PeakMemory() as memory:
        target, result = prune_to_first_target(model, inputs)
    macs = result.report.macs[0]
    say(target=target, **describe_result(result), **describe_memory(memory, model))
    del result
    say(stage="timing")
    options = TARGETS[target]
    seconds = [timed(fxprune.prune, model, inputs, **options) for _ in range(REPEATS)]
    say(seconds=statistics.median(seconds), stages=time_of_stages(model, inputs, options))
    return macs


def measure_peer(suite: str, name: str) -> None:
    """Prune a model by Torch-Pruning, run the result, and say what it took."""
    model, inputs = describe_subject(suite, name)
    whole = count_macs(model, inputs)
    for ratio in PEER_RATIOS:
        say(stage="prune", target=f"ratio {ratio:.0%}")
        job, slim = prune_by_peer(ratio), copy.deepcopy(model)
        with PeakMemory() as memory:
            slim = job(slim, inputs)
        say(stage="running the result")
        left = count_macs(slim, inputs) / whole
        if left <= ENOUGH:
            break
    say(macs=whole, macs_left=left, **describe_memory(memory, model), stage="timing")
    if left == 1:
        raise TargetError("nothing left the model")
    copies = (copy.deepcopy(model) for _ in range(REPEATS))
    say(seconds=statistics.median(timed(job, fresh, inputs) for fresh in copies))


TOOLS: Mapping[str, Callable[[str, str], None]] = {"fxprune": measure_fxprune, "torch-pruning": measure_peer}


def describe_subject(suite: str, name: str) -> tuple[nn.Module, Inputs]:
    """Build a model and say what it is."""
    say(stage="build")
    built = build(suite, name)
    shapes = ["x".join(map(str, tensor.shape)) for tensor in built.inputs.tensors()]
    say(input=", ".join(shapes), parameters=sum(p.numel() for p in built.model.parameters()))
    return built.model, built.inputs


def load_lazy_imports() -> None:
    """Prune a tiny model by both front ends, so that no import is timed or counted as memory."""
    tiny = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    for frontend in ("symbolic", "export"):
        fxprune.prune(tiny, torch.rand(1, 3, 4, 4), macs="60%", frontend=frontend)


def prune_to_first_target(model: nn.Module, inputs: Inputs) -> tuple[str, Result]:
    """Prune to the first of `TARGETS` that the model reaches."""
    for target, options in TARGETS.items():
        try:
            result = fxprune.prune(model, inputs, **options)
        except TargetError:
            continue
        if not bool(result.kept.all()):
            return target, result
    raise TargetError(f"no channel may leave; pinned by {pinning(result)}")


def describe_result(result: Result) -> dict[str, Any]:
    """Return front end, shares of channels, reachable minima and what is left."""
    facts = trace_facts(result.traced)
    before, after = result.report.macs
    return {
        "frontend": facts.frontend,
        "notes": len(facts.notes),
        "opaque": len(facts.opaque),
        **shares_of_channels(result),
        "pinned_by": pinning(result),
        "least_exact": least_macs(result, statistical=False) / before,
        "least_statistical": least_macs(result, statistical=True) / before,
        "macs": before,
        "macs_left": after / before,
    }


def shares_of_channels(result: Result) -> dict[str, float]:
    """Return which fractions of all output channels of layers may leave exactly, with approximation, or not."""
    outputs = result.report.outputs
    return {kind: count / max(outputs.total, 1) for kind, count in asdict(outputs).items()}


def pinning(result: Result, most: int = 4) -> str:
    """Return the reasons that pin most output channels, with their numbers."""
    return "; ".join(f"{c.channels} × {c.reason} ({c.operator})" for c in result.report.pinning[:most])


def least_macs(result: Result, *, statistical: bool) -> float:
    """Return the MACs with one class left in every orbit that may be cut."""
    eligible = eligible_orbits(result.traced, result.orbits, Constraints(allow_statistical=statistical))
    by_width = CostModel(result.traced, result.orbits).by_width("macs", eligible)
    return float(by_width(torch.ones(len(eligible), dtype=torch.float64)))


def describe_memory(memory: PeakMemory, model: nn.Module) -> dict[str, float]:
    """Return the peak that a job added, in MB and as a multiple of the model's tensors."""
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return {"memory_mb": memory.added / 1e6, "memory_ratio": memory.added / size}


def time_of_stages(model: nn.Module, inputs: Inputs, options: Mapping[str, Any]) -> str:
    """Return the seconds of every pass of a job and of the rest, which is tracing and copying."""
    found: dict[str, float] = {}

    def note(event: PassEvent) -> None:
        found[event.name.partition("{")[0]] = event.seconds

    total = timed(fxprune.prune, model, inputs, observers=[note], **options)
    found["the rest"] = total - sum(found.values())
    return "; ".join(f"{stage} {seconds:.3f}" for stage, seconds in found.items())


def describe_laws(suite: str, name: str, macs: float) -> dict[str, Any]:
    """Check the laws and return on which input, with which errors."""
    start = time.perf_counter()
    model, inputs = inputs_for_laws(suite, name, macs)
    dependent = is_data_dependent(suite, name)
    laws = check_laws(model, inputs, counted=not dependent)
    return {
        "laws_input": ", ".join("x".join(map(str, tensor.shape)) for tensor in inputs.tensors()),
        "error_traced": laws.traced,
        "error_slim": laws.slim,
        "effect_of_masks": laws.masked,
        "macs_counted": "data-dependent" if dependent else "equal",
        "laws_seconds": time.perf_counter() - start,
    }


def outcome_of(error: Exception) -> str:
    """Return what an exception says of a model."""
    if isinstance(error, UsageError):
        return "refused"
    if isinstance(error, AssertionError):
        return "wrong"
    return "memory" if isinstance(error, MemoryError) or "not enough memory" in str(error) else "crashed"


def main() -> None:
    """Measure, and print the outcome whatever happens."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("suite")
    parser.add_argument("name")
    parser.add_argument("tool", choices=TOOLS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    try:
        TOOLS[arguments.tool](arguments.suite, arguments.name)
    except Exception as error:
        say(outcome=outcome_of(error), reason=f"{type(error).__name__}: {error}")
    else:
        say(outcome="ok", stage="")


if __name__ == "__main__":
    main()
