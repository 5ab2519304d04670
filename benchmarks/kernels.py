"""Times of int8 linear layers: our kernels, torch's dense (oneDNN) and block-sparse (FBGEMM) ones, and float32.

The shapes are all distinct 1×1 convolutions of the models at batch 1: M positions, K inputs, N outputs; weights are
zero in random 1×4 blocks. All backends of a shape are timed in turn, uint8 in and out, and theirs are called without a
layer of ours around them. `auto` is what lowering chooses: the backend that was fastest in the first third of the
rounds, its time that of the others. GOPS count what is left to multiply, two operations each; the peak is that of dot
products from registers, measured in the same run.

    python -m benchmarks.kernels --threads 1,2 --json kernels.json
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from benchmarks.machine import describe_run, publish
from fxprune.runtime import native
from fxprune.runtime.int8 import block_sparse_int8_linear, compress, pack, vendor

MODELS = {"fbnetv3_g": 240, "efficientnet_b0": 224, "mobilenetv2_100": 224}
"""timm's name → image size."""

SPARSITIES = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

OURS, DENSE, ONEDNN, FBGEMM, FLOAT, AUTO = "native 1x4", "native dense", "onednn", "fbgemm", "float32", "auto"
CHANNELS_LAST = "native 1x4, channels-last"
"""The same kernel where neither side is packed."""

CHOICES = (OURS, DENSE, ONEDNN)
"""What lowering chooses from; FBGEMM's sums saturate at 16 bits."""


@dataclass(frozen=True)
class Row:
    """The median time of one call."""

    model: str
    M: int
    K: int
    N: int
    sparsity: float
    threads: int
    backend: str
    microseconds: float


Shape = tuple[int, int, int]


def shapes(model: nn.Module, size: int) -> list[Shape]:
    """Return the distinct (M, K, N) of a model's 1×1 convolutions."""
    found: dict[Shape, None] = {}

    def note(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
            found[output.shape[0] * output.shape[2] * output.shape[3], layer.in_channels, layer.out_channels] = None

    for layer in model.modules():
        layer.register_forward_hook(note)
    with torch.inference_mode():
        model.eval()(torch.rand(1, 3, size, size))
    return list(found)


def sparse_weight(rows: int, columns: int, sparsity: float) -> Tensor:
    """Return int8 [N, K] of which that share of 1×4 blocks is zero, and nothing else."""
    blocks = rows * math.ceil(columns / 4)
    kept = torch.zeros(blocks, dtype=torch.bool)
    kept[torch.randperm(blocks)[: max(round(blocks * (1 - sparsity)), 1)]] = True
    mask = kept.view(rows, -1).repeat_interleave(4, 1)[:, :columns]
    return torch.randint(1, 128, (rows, columns)).to(torch.int8) * mask


def calls(shape: Shape, sparsity: float) -> dict[str, Callable[[], Tensor]]:
    """Return backend → a call of a layer; what a backend prepares once is prepared."""
    positions, inputs, outputs = shape
    weight = sparse_weight(outputs, inputs, sparsity)
    levels = torch.randint(0, 128, (positions, inputs), dtype=torch.uint8)
    packed, x = pack(levels), torch.rand(positions, inputs)
    numbers = (torch.zeros(outputs, dtype=torch.int32), torch.full((outputs,), 1e-3), torch.full((outputs,), 100.0))

    def operator(block: tuple[int, int], keep_zeros: bool, given: Tensor, layout: str) -> Callable[[], Tensor]:
        matrix = compress(weight, block, keep_zeros=keep_zeros)
        held = (matrix.values, matrix.columns, matrix.row_pointers, *numbers, None, 0.0, 255.0, torch.uint8)
        return lambda: block_sparse_int8_linear(given, *held, layout, layout, "native")

    matrix = compress(weight, (1, 4))
    theirs = (inputs, matrix.values, matrix.columns, matrix.row_pointers, *numbers)
    prepacked, zeros, bias = vendor.onednn_weights(*theirs)
    sparse = vendor.fbgemm_weights(*theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch._make_per_tensor_quantized_tensor(levels, 1.0, 0)
    floats = weight.float()
    return {
        OURS: operator((1, 4), False, packed, "packed"),
        CHANNELS_LAST: operator((1, 4), False, levels, "channels-last"),
        DENSE: operator((4, 4), True, packed, "packed"),
        ONEDNN: lambda: torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 0, prepacked, numbers[1], zeros, bias, 1.0, 0, torch.uint8, "none", [], ""
        ),
        FBGEMM: lambda: torch.ops.sparse.qlinear(quantized, sparse, 1.0, 0),
        FLOAT: lambda: functional.linear(x, floats),
    }


def times(every: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Return microseconds of every call in every round; the calls take turns, three times each."""
    taken: dict[str, list[float]] = {name: [] for name in every}
    for call in every.values():
        call()
    for _ in range(rounds):
        for name, call in every.items():
            start = time.perf_counter()
            call(), call(), call()
            taken[name].append((time.perf_counter() - start) / 3 * 1e6)
    return taken


def measured(model: str, shape: Shape, sparsity: float, rounds: int) -> Iterator[Row]:
    """Yield the rows of one shape and sparsity."""
    taken = times(calls(shape, sparsity), rounds)
    where = (model, *shape, sparsity, torch.get_num_threads())
    first = rounds // 3
    chosen = min(CHOICES, key=lambda name: statistics.median(taken[name][:first]))
    for name, all_times in taken.items():
        yield Row(*where, name, statistics.median(all_times[first:]))
    yield Row(*where, AUTO, statistics.median(taken[chosen][first:]))


def mean(values: Iterable[float]) -> float:
    """Return the geometric mean."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


Times = dict[tuple[Shape, float, str], float]


def summary(model: str, threads: int, rows: Iterable[Row]) -> str:
    """Return Markdown: at every sparsity, geometric means over the shapes of how many times faster ours is."""
    held = {((r.M, r.K, r.N), r.sparsity, r.backend): r for r in rows if (r.model, r.threads) == (model, threads)}
    t: Times = {key: row.microseconds for key, row in held.items()}
    every = list(dict.fromkeys(shape for shape, _, _ in t))
    spatial = [shape for shape in every if shape[0] > 1]
    lines = []
    for sparsity in dict.fromkeys(sparsity for _, sparsity, _ in t):

        def faster(ours: str, theirs: str, among: list[Shape], at: float = sparsity) -> float:
            return mean(t[shape, at, theirs] / t[shape, at, ours] for shape in among)

        worst = max(t[s, sparsity, AUTO] / min(t[s, sparsity, ONEDNN], t[s, sparsity, FBGEMM]) for s in every)
        gops = [2 * math.prod(s) * (1 - sparsity) / t[s, sparsity, OURS] / 1e3 for s in spatial]
        ratios = (faster(OURS, ONEDNN, every), faster(OURS, ONEDNN, spatial), faster(OURS, FBGEMM, every))
        more = (faster(AUTO, ONEDNN, every), faster(CHANNELS_LAST, ONEDNN, every), faster(OURS, FLOAT, every))
        lines.append(
            [f"{sparsity:.0%}", *(f"{r:.2f}" for r in (*ratios, *more, worst)), f"{mean(gops):.0f}", f"{max(gops):.0f}"]
        )
    header = ["sparsity", "oneDNN", "oneDNN, M > 1", "FBGEMM", "auto: oneDNN", "channels-last: oneDNN", "float32"]
    header += ["auto / best of theirs, worst", "GOPS, M > 1", "GOPS, most"]
    table = tabulate(lines, header, "github", disable_numparse=True, colalign=("right",) * len(header))
    title = f"{model}, {len(every)} shapes, {threads} thread{'s' * (threads != 1)}"
    return f"**{title}: how many times faster ours is than …**\n\n{table}"


def peak() -> float:
    """Return GOPS of dot products from registers, one thread."""
    library = native.library()
    if library is None:
        raise SystemExit(f"no native kernels: {native.why_not()}")
    measure = ctypes.CDLL(str(library.path)).fxprune_peak_gops
    measure.restype = ctypes.c_double
    return float(measure())


def main() -> None:
    """Measure, print, and on request write."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="of timm")
    parser.add_argument("--sparsities", default=",".join(map(str, SPARSITIES)))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    names, sparsities = arguments.models.split(","), [float(s) for s in arguments.sparsities.split(",")]
    threads = [int(count) for count in arguments.threads.split(",")]
    found = {name: shapes(timm.create_model(name), MODELS.get(name, 224)) for name in names}
    cases = [case for name in names for case in itertools.product([name], found[name], sparsities)]
    peaks = [peak()]
    rows: list[Row] = []
    for count in threads:
        torch.set_num_threads(count)
        for name, shape, sparsity in tqdm(cases, f"{count} threads", leave=False):
            rows.extend(measured(name, shape, sparsity, arguments.rounds))
    peaks.append(peak())
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    library = native.library()
    assert library is not None
    facts = (
        f"* kernels: {library.instruction_set}; peak {min(peaks):.0f} to {max(peaks):.0f} GOPS a core, before and after"
    )
    tables = [summary(name, count, rows) for name in names for count in threads]
    publish([f"{describe_run(('torch', 'timm', 'fxprune'))}\n{facts}", *tables], arguments.markdown)


if __name__ == "__main__":
    main()
