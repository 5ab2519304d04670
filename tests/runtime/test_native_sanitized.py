"""The kernels in a program of their own, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from fxprune.runtime.native.build import SOURCES, build_program
from fxprune.runtime.native.toolchain import toolchain
from tests.runtime.native import needs_compiler, write_sources

pytestmark = needs_compiler

SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O0")
"""Not optimised: a compiler takes minutes over vectors that it unrolls, sanitises and optimises."""

VARIANTS = {"this CPU": (), "without AVX-512": ("-mno-avx512f",), "without AVX2": ("-mno-avx2",)}

READ = "int at(const int* data, int i) { return data[i]; }\n"
NEGATE = "int negated(int i) { return -i; }\n"
MAIN = """
#include <cstdlib>
int at(const int* data, int i);
int negated(int i);
int main(int count, char**) {
  int* data = static_cast<int*>(calloc(4, sizeof(int)));
  int bad = %s;
  free(data);
  return bad & 0;
}
"""

DEFECTS = {
    "clean": ("at(data, 2 + count)", 0, ""),
    "overflow": ("at(data, 3 + count)", 1, "heap-buffer-overflow"),
    "undefined": ("negated(-2147483647 - count)", 1, "cannot be represented"),
    "leak": ("at(static_cast<int*>(calloc(4, sizeof(int))), count)", 1, "detected memory leaks"),
}


@pytest.fixture(scope="module", autouse=True)
def _sanitizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where there is no compiler, or none with sanitizers that run here."""
    folder = tmp_path_factory.mktemp("probe")
    source, program = folder / "probe.cc", folder / "probe"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    for command in ([*toolchain().command, *SANITIZED, source, "-o", program], [program]):
        done = run(command)
        if done.returncode:
            pytest.skip(f"no sanitizers: {done.stderr.strip() or done.returncode}")


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_sanitizers_find_what_they_are_for(defect: str, tmp_path: Path) -> None:
    expression, status, message = DEFECTS[defect]
    folder = write_sources(tmp_path / "sources", read=READ, negate=NEGATE, skipped="#include <torch/library.h>\nwrong")
    (folder / "main.cc").write_text(MAIN % expression, encoding="utf-8")
    done = run([build_program(folder / "main.cc", tmp_path, SANITIZED, folder)])
    assert min(done.returncode, 1) == status, done.stderr
    assert message in done.stderr


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_are_clean(variant: str, tmp_path: Path) -> None:
    program = build_program(SOURCES / "selftest.cc", tmp_path, (*SANITIZED, *VARIANTS[variant]))
    done = run([program])
    assert done.returncode == 0, done.stdout + done.stderr
