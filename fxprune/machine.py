"""What times are taken on: processor, instruction sets, cores, versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["Machine", "instruction_sets", "processor", "this_machine"]

_CPUINFO = Path("/proc/cpuinfo")

_NAMED_SETS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
"""What the kernels of neural networks choose by, as Linux spells it."""


@dataclass(frozen=True)
class Machine:
    """A machine as far as times depend on it; `cores` are those that this process may use."""

    processor: str
    instruction_sets: tuple[str, ...]
    cores: int
    system: str
    versions: dict[str, str]

    def __str__(self) -> str:
        made_by = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        cores = f"{self.cores} core{'s' * (self.cores != 1)}"
        return f"{self.processor} ({', '.join(self.instruction_sets)}), {cores}, {self.system}; {made_by}"


def this_machine(packages: Iterable[str]) -> Machine:
    """Describe this machine, with the versions of those `packages` that are installed."""
    versions = {name: number for name in packages if (number := _version(name)) is not None}
    return Machine(processor(), instruction_sets(), _cores(), platform.system(), versions)


def processor() -> str:
    """Return the processor's model name, as the system tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """Return the vector instructions that the processor has; where the system does not tell, what torch uses."""
    has = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return tuple(name for name in _NAMED_SETS if name in has) or (torch.backends.cpu.get_cpu_capability(),)


def _cpuinfo(wanted: str) -> str:
    """Return the first value of a key of Linux's list of processors, empty where there is none."""
    if not _CPUINFO.exists():
        return ""
    pairs = (line.partition(":") for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines())
    return next((value.strip() for key, _, value in pairs if key.strip() == wanted), "")


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
