"""What a benchmark was taken on, and with which command line, as Markdown."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

from fxprune.machine import instruction_sets, processor

__all__ = ["describe_run", "publish"]


def describe_run(packages: Iterable[str]) -> str:
    """Return Markdown lines: machine, threads, versions, command."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    sets = ", ".join(instruction_sets())
    return "\n".join(
        (
            f"* machine: {processor()} ({sets}), {torch.get_num_threads()} thread(s), {platform.system()}",
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
