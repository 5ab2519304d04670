"""Time and memory of making a large model sparse: `fxprune.sparsify` to a global target, all layers.

Each case runs in a process of its own, so that one leaves no memory to the next. Memory is what the process holds more
at the peak than before the call, over the size of the model's parameters. The call copies the model, which stays as is.

    python -m benchmarks.thresholding
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import torchvision
from tabulate import tabulate

import fxprune
from benchmarks.machine import describe_run, publish

MODELS = ("wide_resnet101_2", "vit_b_16", "convnext_large")
BLOCKS = ("1x1", "1x4")


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yield a list whose only item is the peak of resident memory in the block, in bytes."""
    process, peak, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def row_of(name: str, block: str, repeats: int, threads: int) -> tuple[str, ...]:
    """Make one model 80 % sparse; return its row. The first call is timed too, and its memory counts."""
    torch.set_num_threads(threads)
    model, image = torchvision.models.get_model(name).eval(), torch.rand(1, 3, 224, 224)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    gc.collect()
    before, seconds, memory = psutil.Process().memory_info().rss, [], 0.0
    for repeat in range(repeats):
        with peak_memory() as peak:
            start = time.perf_counter()
            result = fxprune.sparsify(model, image, sparsity=0.8, scope="global", layers="all", block=block)
            seconds.append(time.perf_counter() - start)
        memory = (peak[0] - before) / size if repeat == 0 else memory
        reached = result.report.sparsity[1]
        del result
    median = sorted(seconds)[len(seconds) // 2]
    parameters = f"{size / 4e6:.1f} M"
    return name, parameters, block, f"{reached:.1%}", f"{median:.2f}", f"{max(seconds):.2f}", f"{memory:.2f}"


def main() -> None:
    """Measure, print, and on request write."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="of torchvision")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [(name, block) for name in arguments.models.split(",") for block in BLOCKS]
    rows = []
    for name, block in cases:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(row_of, (name, block, arguments.repeats, arguments.threads)))
    header = ["model", "parameters", "block", "zeros of all", "seconds, median", "most", "memory, models"]
    table = tabulate(rows, header, "github", disable_numparse=True, colalign=("left", *["right"] * 6))
    publish([describe_run(("torch", "torchvision", "fxprune")), table], arguments.markdown)


if __name__ == "__main__":
    main()
