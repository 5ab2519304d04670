"""What a measurement was taken on: processor, versions, threads, command line."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["describe_run", "publish"]


def processor() -> str:
    """Return the processor's model name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """Return the widest vector instructions that torch uses here."""
    return torch.backends.cpu.get_cpu_capability()


def describe_run(packages: Iterable[str]) -> str:
    """Return Markdown lines: machine, threads, versions, command."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    return "\n".join(
        (
            f"* machine: {processor()} ({instruction_set()}), {torch.get_num_threads()} thread(s), {platform.system()}",
            f"* versions: Python {platform.python_version()}, {versions}",
            f"* command: `{command}`",
        )
    )


def publish(parts: Iterable[str], file: Path | None) -> None:
    """Print Markdown, and write it to `file` where there is one."""
    text = "\n\n".join(parts)
    print(text)
    if file is not None:
        file.write_text(text + "\n")
