"""What gates cost: the time of an optimizer step with them beside one without, and whether expected costs are exact.

A step is forward, cross-entropy, backward and AdamW on a batch of random images, batch norms frozen in all variants, so
that it is the gates that are compared. The variants add one thing after the other and take turns, which tells what each
costs. Then gates of several models are set to probabilities of 0 and 1 at random: the expected cost must be that of
what they keep, and that which `torch.utils.flop_counter` counts on the cut graph.

    python -m benchmarks.gate_cost
    python -m benchmarks.gate_cost --model resnet18 --rounds 5 --exact resnet50,vit_b_16
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, fx, nn

import fxprune
from benchmarks.jobs import count_macs
from benchmarks.machine import describe_run, publish
from fxprune import Inputs
from fxprune.gating.gates import Gates
from fxprune.graph.passes import Pass, Pipeline
from fxprune.graph.shapes import input_pixels
from fxprune.latency import Times, time_in_turn
from fxprune.runtime.gates import TrainedGate
from fxprune.runtime.masks import MASKS, gates_of
from fxprune.training import Training, cross_entropy
from fxprune.training.groups import make_optimizer
from fxprune.training.hooks import Moment
from fxprune.training.learned_channels import LearnedChannels
from passes import ChannelSurgery, GateHardening, MaskInsertion

EXACT = ("mobilenet_v2", "resnet50", "densenet121", "efficientnet_b0", "vit_b_16")
BEGIN, MIDDLE = (Moment(epoch=1, step=step, steps=2, measure=dict) for step in (0, 1))
"""Of a run; half-way through it penalties count."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Variant:
    """A graph to train.

    Attributes:
        passes: what is put into the graph.
        differentiated: whether masks that are no gates get gradients, as the samples of gates do.
        penalised: whether cost and entropy of the gates join the loss.
        beyond: the variant that lacks one thing of it.
        adds: that thing.
    """

    passes: tuple[Pass, ...]
    differentiated: bool = False
    penalised: bool = False
    beyond: str = ""
    adds: str = ""


MASKED = (MaskInsertion(),)
TRAINED = (MaskInsertion(kind="gate", logits="trained"),)
PREDICTED = (MaskInsertion(kind="gate", logits="predicted"),)
PLAIN = "no gates"
VARIANTS = {
    PLAIN: Variant(()),
    "constant masks": Variant(MASKED, beyond=PLAIN, adds="multiplying by masks"),
    "masks with gradients": Variant(MASKED, differentiated=True, beyond="constant masks", adds="gradients of masks"),
    "trained logits, no penalty": Variant(TRAINED, beyond="masks with gradients", adds="sampling"),
    "trained logits": Variant(
        TRAINED, penalised=True, beyond="trained logits, no penalty", adds="penalties, trained logits"
    ),
    "predicted logits, no penalty": Variant(PREDICTED, beyond="trained logits, no penalty", adds="predictors"),
    "predicted logits": Variant(
        PREDICTED, penalised=True, beyond="predicted logits, no penalty", adds="penalties, predicted logits"
    ),
}


def step_of(model: nn.Module, variant: Variant, batch: Batch) -> Callable[[], None]:
    """Return what takes one optimizer step on a graph of its own."""
    module = fxprune.run_passes(copy.deepcopy(model).eval(), batch[0][:1], variant.passes).train()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval().requires_grad_(False)
    if variant.differentiated:
        for mask in module.get_submodule(MASKS).buffers():
            mask.requires_grad_(mask.is_floating_point())
    hooks = [LearnedChannels(0.5 * Gates(module).whole)] if gates_of(module) else []
    optimizer = make_optimizer(module, hooks, Training(1, learning_rate=1e-4, optimizer="adamw"))
    for hook in hooks:
        hook.before_epoch(module, BEGIN)
    penalties = hooks if variant.penalised else []

    @torch.enable_grad()
    def step() -> None:
        loss = sum((hook.penalty(module, MIDDLE) for hook in penalties), cross_entropy(module, batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def time_steps(name: str, size: int, batch: int, rounds: int, warmup: int) -> dict[str, Times]:
    """Time steps of all variants in turn."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    fxprune.recalibrate_batchnorm(model, [images])  # or values would vanish in the frozen network
    steps = {title: step_of(model, variant, (images, labels)) for title, variant in VARIANTS.items()}
    return time_in_turn(steps, runs=rounds, warmup=warmup)


def ratios(times: Times, base: Times) -> Times:
    """Return how many times longer than in `base` each step took, round by round."""
    return Times(tuple(a / b for a, b in zip(times.milliseconds, base.milliseconds, strict=True)))


def step_table(times: dict[str, Times]) -> str:
    """Return the times of all variants as Markdown."""
    rows = []
    for name, found in times.items():
        ratio = ratios(found, times[PLAIN])
        spans = ("{:.3f} to {:.3f}".format(*ratio.quartiles), f"{ratio.median:.3f}")
        rows.append((name, f"{found.median:.0f}", "{:.0f} to {:.0f}".format(*found.quartiles), *reversed(spans)))
    header = ["step", "median, ms", "quartiles, ms", "ratio, median of rounds", "quartiles of ratio"]
    return tabulate(rows, header, "github", disable_numparse=True, colalign=("left", *["right"] * 4))


def parts_table(times: dict[str, Times]) -> str:
    """Return what each variant adds to another, as Markdown: medians of the differences in each round."""
    rows = []
    for name, variant in VARIANTS.items():
        if not variant.beyond:
            continue
        pairs = zip(times[name].milliseconds, times[variant.beyond].milliseconds, strict=True)
        more = Times(tuple(own - other for own, other in pairs))
        share = more.median / times[PLAIN].median
        spread = "{:+.1f} to {:+.1f}".format(*more.quartiles)
        rows.append((variant.adds, f"{name} − {variant.beyond}", f"{more.median:+.1f}", spread, f"{share:+.1%}"))
    header = ["part", "difference of", "median, ms", "quartiles, ms", "of the step without gates"]
    return tabulate(rows, header, "github", disable_numparse=True, colalign=("left", "left", *["right"] * 3))


@dataclass(frozen=True)
class Exactness:
    """Thousand MACs per input pixel of a model whose gates have decided: the largest of several draws in `expected`.

    Attributes:
        gates: how many orbits have one, and `units`, how many logits those have.
        whole: of the model.
        kept: of what the gates keep, from … to.
        expected: how far the expected cost is from what is kept, relative.
        counted: how far what the counter finds on the cut graph is from it, relative.
    """

    model: str
    gates: int
    units: int
    whole: float
    kept: tuple[float, float]
    expected: float
    counted: float


def decide(module: fx.GraphModule, generator: torch.Generator) -> None:
    """Set every logit to 1000 or −1000 at random; one block of every orbit stays for certain."""
    for gate in gates_of(module).values():
        assert isinstance(gate, TrainedGate)
        stays = torch.rand(gate.units, generator=generator) < 0.5
        stays[int(torch.randint(gate.units, (), generator=generator))] = True
        gate.logit.data = torch.where(stays, 1000.0, -1000.0)


def exactness(name: str, size: int, draws: int) -> Exactness:
    """Compare expected, kept and counted costs of a model over several draws."""
    torch.manual_seed(0)
    model, image = torchvision.models.get_model(name).eval(), torch.randn(1, 3, size, size)
    module = fxprune.run_passes(model, image, TRAINED)
    gates, thousands = Gates(module), input_pixels(module) * 1000
    generator = torch.Generator().manual_seed(0)
    kept, expected, counted = [], [], []
    for _ in range(draws):
        decide(module, generator)
        logits = gates.logits().detach()
        hard = gates.hard_macs(logits)
        cut = Pipeline((GateHardening(), ChannelSurgery()))(module).graph_module
        kept.append(hard / thousands)
        expected.append(float(gates.expected_macs(logits)) / hard - 1)
        counted.append(count_macs(cut, Inputs((image,))) / hard - 1)
    found = max(expected, key=abs), max(counted, key=abs)
    units = len(gates.owners)
    return Exactness(name, len(gates.pairs), units, gates.whole / thousands, (min(kept), max(kept)), *found)


def exactness_table(rows: Sequence[Exactness]) -> str:
    """Return the comparison as Markdown."""
    cells = [
        (
            row.model,
            f"{row.gates}",
            f"{row.units:,}",
            f"{row.whole:.2f}",
            "{:.2f} to {:.2f}".format(*row.kept),
            f"{row.expected:.1e}",
            f"{row.counted:.1e}",
        )
        for row in rows
    ]
    header = ["model", "gates", "logits", "kFPP", "kFPP kept", "expected / kept − 1", "counted / kept − 1"]
    return tabulate(cells, header, "github", disable_numparse=True, colalign=("left", *["right"] * 6))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="mobilenet_v2", help="of torchvision, whose steps are timed")
    parser.add_argument("--exact", default=",".join(EXACT), help="of torchvision, whose costs are compared")
    parser.add_argument("--size", type=int, default=224, help="of images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of every variant")
    parser.add_argument("--warmup", type=int, default=2, help="steps of every variant before those")
    parser.add_argument("--draws", type=int, default=5, help="of decided gates")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and on request write."""
    arguments = parse_arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    times = time_steps(arguments.model, arguments.size, arguments.batch, arguments.rounds, arguments.warmup)
    rows = []
    for name in arguments.exact.split(","):
        rows.append(exactness(name, arguments.size, arguments.draws))
        print(rows[-1], file=sys.stderr)
    head = describe_run(("torch", "torchvision", "fxprune"))
    shown = f"\n* {arguments.model}, batch {arguments.batch}, {arguments.size}²; {arguments.rounds} rounds in turn"
    publish([head + shown, step_table(times), parts_table(times), exactness_table(rows)], arguments.markdown)


if __name__ == "__main__":
    main()
