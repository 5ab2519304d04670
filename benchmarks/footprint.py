"""What a lowered model weighs: files, memory of a process that runs it, and the compilation on first use.

Every figure comes from a process of its own. Memory is what building a float model, or loading a lowered one from its
`.pt2`, and five runs add to the resident set at its peak.

    python -m benchmarks.footprint
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from tabulate import tabulate
from torch import nn

import fxprune
from benchmarks.latency import MODELS, WITH_LARGER_KERNELS, build
from benchmarks.machine import describe_run, publish
from benchmarks.thresholding import peak_memory
from fxprune.runtime import native


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def added(work: Callable[[], object]) -> float:
    """Return the megabytes that a piece of work adds to the resident set at its peak."""
    gc.collect()
    before = psutil.Process().memory_info().rss
    with peak_memory() as peak:
        work()
    return max(peak[0] - before, 0) / 1e6


def _image(name: str) -> torch.Tensor:
    return torch.randn(1, 3, MODELS[name], MODELS[name])


@torch.inference_mode()
def memory_of_float(name: str) -> float:
    """Return the megabytes that building a float model and running it a few times adds."""
    return added(lambda: _run(build(name), name))


@torch.inference_mode()
def memory_of_program(path: Path, name: str) -> float:
    """Return the megabytes that loading a `.pt2` and running it a few times adds."""
    native.load()
    return added(lambda: _run(torch.export.load(path).module(), name))


def _run(module: nn.Module, name: str) -> nn.Module:
    for _ in range(5):
        module(_image(name))
    return module


def write(name: str, sparsity: float, folder: Path) -> tuple[float, float]:
    """Lower a model and save it; return the megabytes of its weights and of its program."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    image = _image(name)
    model = build(name)
    options: dict[str, Any] = {"im2col": "*", "layers": "all"} if name in WITH_LARGER_KERNELS else {}
    result = fxprune.lower(model, image, calibration=[image], sparsity=sparsity or None, backend="native", **options)
    fxprune.save(result, folder, pt2=True)
    weights, program = ((folder / file).stat().st_size / 1e6 for file in ("model.safetensors", "model.pt2"))
    return weights, program


def first_use(cache: str) -> tuple[float, float]:
    """Return how many seconds the kernels take to load from the folder `cache`, and how many of them are compiling."""
    os.environ["FXPRUNE_CACHE"] = cache
    start = time.perf_counter()
    library = native.library()
    if library is None:
        raise SystemExit(f"no native kernels: {native.why_not()}")
    return time.perf_counter() - start, library.seconds


def rows(name: str, sparsities: list[float]) -> list[list[str]]:
    """Return the rows of a model."""
    floats = sum(t.numel() * t.element_size() for t in build(name).state_dict().values()) / 1e6
    found = [[name, "float32", f"{floats:.1f}", "", f"{apart(memory_of_float, name):.0f}"]]
    for sparsity in sparsities:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            weights, program = apart(write, name, sparsity, folder)
            memory = apart(memory_of_program, folder / "model.pt2", name)
        found.append([name, f"lowered {sparsity:.0%}", f"{weights:.1f}", f"{program:.1f}", f"{memory:.0f}"])
    return found


def main() -> None:
    """Measure, print, and on request write."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="of timm")
    parser.add_argument("--sparsities", default="0.0,0.6")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to FILE")
    arguments = parser.parse_args()
    sparsities = [float(s) for s in arguments.sparsities.split(",")]
    lines = [line for name in arguments.models.split(",") for line in rows(name, sparsities)]
    header = ["model", "variant", "weights, MB", ".pt2, MB", "memory at the peak, MB"]
    table = tabulate(
        lines, header, "github", disable_numparse=True, colalign=("left", "left", "right", "right", "right")
    )
    with tempfile.TemporaryDirectory() as cache:
        (first, compiling), (second, _) = apart(first_use, cache), apart(first_use, cache)
    facts = f"{first:.1f} s, of which compiling {compiling:.1f} s; later processes {second * 1e3:.0f} ms"
    head = f"{describe_run(('torch', 'timm', 'fxprune'))}\n* first use of the kernels: {facts}"
    publish([head, table], arguments.markdown)


if __name__ == "__main__":
    main()
