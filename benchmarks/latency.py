"""Whole networks at batch 1: eager, compiled, lowered at several sparsities, and ONNX Runtime and OpenVINO in float32.

Sparse weights are random models' smallest 1×4 blocks, so times are real and accuracy is not; activations are calibrated
on the input. `im2col` rows compute larger kernels on integers too; `oneDNN int8` is the same graph with torch's dense
kernels. All rows of a model take turns in one run.

    python -m benchmarks.latency --json latency.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from tabulate import tabulate
from torch import nn

import fxprune
from benchmarks.machine import describe_run, publish
from fxprune.timing.comparison import Comparison

MODELS = {"fbnetv3_g": 240, "efficientnet_b0": 224, "mobilenetv2_100": 224, "resnet50": 224}
"""timm's name → image size."""

SPARSITIES = (0.0, 0.4, 0.5, 0.6)

WITH_LARGER_KERNELS = ("resnet50",)
"""Models most of whose work is in larger kernels."""

PEERS = ("eager", "compiled", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Row:
    """The median time of one run of a model."""

    model: str
    variant: str
    sparsity: float
    threads: int
    milliseconds: float


@dataclass(frozen=True)
class Artifact:
    """What lowering a model costs, and what is saved."""

    sparsity: float
    seconds: float
    megabytes: float


def build(name: str) -> nn.Module:
    """Build a model with random weights, none of them zero."""
    options: dict[str, Any] = {"zero_init_last": False} if name.startswith("resnet") else {}
    return timm.create_model(name, **options).eval()


DENSE_INT8 = {"backend": "onednn", "block": "dense"}
"""Torch's own int8 kernels in the same graph: what a sparse kernel has to beat."""


def lowered(
    model: nn.Module, image: torch.Tensor, sparsity: float, options: dict[str, Any]
) -> tuple[fxprune.Result, Artifact]:
    """Lower a model; say how long it took and what its folder weighs."""
    start = time.perf_counter()
    result = fxprune.lower(model, image, calibration=[image], sparsity=sparsity or None, **options)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        fxprune.save(result, Path(folder) / "model")
        size = (Path(folder) / "model" / "model.safetensors").stat().st_size
    return result, Artifact(sparsity, seconds, size / 1e6)


def variants(
    name: str, model: nn.Module, image: torch.Tensor, sparsities: list[float]
) -> Iterator[tuple[str, fxprune.Result, Artifact]]:
    """Yield (name of the row, result, artifact) of everything that is lowered."""
    kinds: dict[str, dict[str, Any]] = {"": {}}
    if name in WITH_LARGER_KERNELS:
        kinds[", im2col"] = {"im2col": "*", "layers": "all"}
    for kind, options in kinds.items():
        yield f"oneDNN int8{kind}", *lowered(model, image, 0.0, options | DENSE_INT8)
        for sparsity in sparsities:
            yield f"lowered {sparsity:.0%}{kind}", *lowered(model, image, sparsity, options)


def compare(
    name: str, threads: int, sparsities: list[float], runs: int, peers: tuple[str, ...]
) -> tuple[Comparison, dict[str, Artifact], float]:
    """Measure one model; return the times, what lowering made, and the size of the float weights in megabytes."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, size = build(name), MODELS.get(name, 224)
    image = torch.randn(1, 3, size, size)
    made = list(variants(name, model, image, sparsities))
    modules = {title: result.module for title, result, _ in made}
    modules |= {f"{title}, compiled": torch.compile(result.module) for title, result, _ in made[-1:]}
    found = fxprune.bench(model, image, peers, modules=modules, runs=runs, threads=threads, name=name)
    floats = sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6
    return found, {title: artifact for title, _, artifact in made}, floats


def rows_of(found: Comparison, artifacts: dict[str, Artifact]) -> Iterator[Row]:
    """Yield the rows of a model."""
    for row in found.variants:
        if row.times is not None:
            made = artifacts.get(row.variant.removesuffix(", compiled"))
            sparsity = 0.0 if made is None else made.sparsity
            yield Row(found.model, row.variant, sparsity, found.threads, row.times.median)


def tables(found: Comparison, artifacts: dict[str, Artifact], floats: float) -> str:
    """Return Markdown: times, and what lowering made."""
    lines = [
        [title, f"{a.seconds:.1f}", f"{a.megabytes:.1f}", f"{a.megabytes / floats:.0%}"]
        for title, a in artifacts.items()
    ]
    header = ["variant", "seconds to lower", "safetensors, MB", "of float32"]
    saved = tabulate(lines, header, "github", disable_numparse=True, colalign=("left", "right", "right", "right"))
    return f"**{found.model}**\n\n{found.table('github')}\n\n{saved}"


def main() -> None:
    """Measure, print, and on request write."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="of timm")
    parser.add_argument("--sparsities", default=",".join(map(str, SPARSITIES)))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--threads", default="1")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--layers", action="store_true", help="print the time of every call too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    arguments = parser.parse_args()
    sparsities = [float(s) for s in arguments.sparsities.split(",")]
    rows: list[Row] = []
    parts: list[str] = []
    for threads in map(int, arguments.threads.split(",")):
        for name in arguments.models.split(","):
            found, artifacts, floats = compare(
                name, threads, sparsities, arguments.runs, tuple(arguments.peers.split(","))
            )
            rows.extend(rows_of(found, artifacts))
            parts.append(tables(found, artifacts, floats))
            parts.extend([found.layer_table("github")] * arguments.layers)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    publish([describe_run(("torch", "timm", "onnxruntime", "openvino", "fxprune")), *parts], arguments.markdown)


if __name__ == "__main__":
    main()
