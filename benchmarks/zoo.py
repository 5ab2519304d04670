"""Every model of the public zoos, or a reason: what can leave, whether the laws hold, time and memory.

Each model is measured in a process of its own, under a limit of memory and time, by fxprune and by Torch-Pruning.
Every finished model is a row of `zoo-SUITE.csv`; a run that was stopped goes on where it was, and the tables of
`zoo-SUITE.md` are made from the rows.

    python -m benchmarks.zoo --suites torchvision --tools fxprune
    python -m benchmarks.zoo --suites timm --only swin_t,vit_b_16 --again
    python -m benchmarks.zoo --again-failed
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import psutil
from tqdm import tqdm

from benchmarks.machine import describe_run, publish
from benchmarks.suites import SUITES
from benchmarks.zoo_rows import Row, Rows
from benchmarks.zoo_tables import tables

TOOLS = ("fxprune", "torch-pruning")
PACKAGES = ("torch", "torchvision", "timm", "transformers", "fxprune", "torch-pruning")
POLL = 0.1
"""Seconds between two looks at a process."""


@dataclass(frozen=True)
class Limits:
    """What one process may take: bytes of resident memory, seconds."""

    memory: float
    seconds: float


def measure(suite: str, model: str, tool: str, limits: Limits) -> Row:
    """Measure one model in a process of its own; return its row whatever happens."""
    command = [sys.executable, "-m", "benchmarks.one_model", suite, model, tool]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        ended = watch(process, limits)
        findings = read_findings(output)
        if "outcome" not in findings:
            findings |= ended or {
                "outcome": "crashed",
                "reason": last_line(errors) or f"exit code {process.returncode}",
            }
    return {"suite": suite, "model": model, "tool": tool, **findings}


def watch(process: subprocess.Popen[bytes], limits: Limits) -> Row:
    """Wait for a process; kill one that goes beyond a limit and return the outcome that this is."""
    seen = psutil.Process(process.pid)
    end = time.monotonic() + limits.seconds
    try:
        while process.poll() is None:
            if seen.memory_info().rss > limits.memory:
                return {"outcome": "memory", "reason": f"more than {limits.memory / 1e9:g} GB"}
            if time.monotonic() > end:
                return {"outcome": "timeout", "reason": f"more than {limits.seconds:g} s"}
            time.sleep(POLL)
    except psutil.NoSuchProcess:
        pass
    finally:
        process.kill()
        process.wait()
    return {}


def read_findings(output: IO[str]) -> dict[str, Any]:
    """Merge the lines of JSON that a process wrote; libraries may have written others."""
    output.seek(0)
    findings: dict[str, Any] = {}
    for line in output:
        if line.startswith("{"):
            findings |= json.loads(line)
    return findings


def last_line(errors: IO[str]) -> str:
    """Return the last line that is not empty."""
    errors.seek(0)
    return next((line.strip() for line in reversed(errors.readlines()) if line.strip()), "")


def run_suite(suite: str, arguments: argparse.Namespace) -> None:
    """Measure what has no row yet, and write the tables."""
    order = {name: i for i, name in enumerate(SUITES[suite](arguments.results))}
    names = [name for name in order if not arguments.only or name in arguments.only]
    rows = Rows(arguments.results / f"zoo-{suite}.csv")
    rows.drop(is_to_be_redone(arguments))
    jobs = [(name, tool) for name in names for tool in arguments.tools if (name, tool) not in rows]
    limits = Limits(arguments.memory * 1e9, arguments.seconds)
    measured = as_measured([partial(measure, suite, name, tool, limits) for name, tool in jobs], arguments.workers)
    for row in tqdm(measured, desc=suite, total=len(jobs), file=sys.stderr):
        rows.append(row)
    ordered = sorted(rows, key=lambda row: order.get(row["model"], len(order)))
    publish([f"# {suite}", describe_run(PACKAGES), *tables(ordered)], arguments.results / f"zoo-{suite}.md")


def as_measured(jobs: Iterable[Callable[[], Row]], workers: int) -> Iterator[Row]:
    """Do jobs, some at a time, and yield every row as soon as it is there; a stop drops the jobs not yet begun."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def is_to_be_redone(arguments: argparse.Namespace) -> Callable[[Row], bool]:
    """Return whether a row of an earlier run is measured again."""

    def redone(row: Row) -> bool:
        if row["tool"] not in arguments.tools:
            return False
        return row["model"] in arguments.again or (arguments.again_failed and row["outcome"] != "ok")

    return redone


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    def names(known: Iterable[str] = ()) -> Callable[[str], tuple[str, ...]]:
        def read(text: str) -> tuple[str, ...]:
            chosen = tuple(filter(None, text.split(",")))
            for name in chosen:
                if known and name not in known:
                    raise argparse.ArgumentTypeError(f"unknown '{name}'; known: {', '.join(known)}")
            return chosen

        return read

    parser.add_argument("--suites", type=names(SUITES), default=",".join(SUITES))
    parser.add_argument("--tools", type=names(TOOLS), default=",".join(TOOLS))
    parser.add_argument("--only", type=names(), default="", metavar="NAME,...", help="these models; all by default")
    parser.add_argument("--again", type=names(), default="", metavar="NAME,...", help="measure these anew")
    parser.add_argument("--again-failed", action="store_true", help="measure anew whatever is not ok")
    parser.add_argument("--workers", type=int, default=1, help="models at a time, one thread each")
    parser.add_argument("--memory", type=float, default=20.0, help="GB that one model may take")
    parser.add_argument("--seconds", type=float, default=600.0, help="seconds that one model may take")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error("--workers is at least 1")
    return arguments


def main() -> None:
    """Measure the suites one after the other."""
    arguments = parse_arguments()
    arguments.results.mkdir(parents=True, exist_ok=True)
    for suite in arguments.suites:
        run_suite(suite, arguments)


if __name__ == "__main__":
    main()
