"""What is read of the system's own description, and what stands in where it has none."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fxprune import machine

INTEL = """processor\t: 0
model name\t: Processor X
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_int8

processor\t: 1
model name\t: Processor Y
flags\t\t: fpu
"""

ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp sve\n"


@pytest.mark.parametrize(
    ("text", "name", "sets"),
    [(INTEL, "Processor X", ("avx2", "avx512f", "avx512_vnni", "amx_int8")), (ARM, None, ("asimd", "asimddp", "sve"))],
)
def test_linux_tells_processor_and_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str | None, sets: tuple[str, ...]
) -> None:
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(text)
    assert machine.instruction_sets() == sets
    assert machine.processor() == (name or machine.processor()) != ""


def test_elsewhere_torch_tells_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "nothing")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    found = machine.this_machine(("torch", "no-such-package"))
    assert found.processor == "riscv64"
    assert found.instruction_sets == (torch.backends.cpu.get_cpu_capability(),)
    assert found.cores == 7
    assert found.versions == {"torch": version("torch")}
    assert str(found).startswith(f"riscv64 ({found.instruction_sets[0]}), 7 cores, ")
    assert str(found).endswith(f"; torch {version('torch')}")
