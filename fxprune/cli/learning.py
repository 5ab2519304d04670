"""Learn which channels matter, cut the others and fine-tune, all from one file: `learn`."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import click
from tabulate import tabulate

from fxprune import artifacts
from fxprune.api import recipes
from fxprune.cli.options import AS_JSON, commands, show_notes
from fxprune.insights.widths import stage_table
from fxprune.recipes.folders import Summary

_EXAMPLE = """
A recipe; paths in it start at its own folder:

\b
    seed = 0

\b
    [model]
    name = "models.py:net"         # or any other MODEL, as torchvision:mobilenet_v2
    checkpoint = "trained.pt"      # or weights = "DEFAULT"
    input = ["1x3x32x32"]          # of example inputs, where they are not known

\b
    [data]                         # functions that return a Dataset, or batches
    train = "task.py:train"
    held_out = "10%"               # or validation = "task.py:test"
    batch_size = 64

\b
    [task]
    loss = "cross-entropy"         # mse, l1, or task.py:loss
    measure = "classification"     # reconstruction, or task.py:measure

\b
    [learn]                        # options of learn_channels and of Training
    macs = "50%"                   # what shall be left
    epochs = 5
    optimizer = "adamw"
    learning_rate = 1e-4

\b
    [finetune]                     # options of distill and of Training
    epochs = 40
    teachers = [{name = "models.py:net", checkpoint = "trained.pt"}]

\b
    [output]
    plots = true                   # also pt2, onnx
"""


@commands.command(epilog=_EXAMPLE)
@click.option("--recipe", required=True, type=click.Path(path_type=Path), help="A TOML file, see below.")
@click.option("--out", type=click.Path(path_type=Path), help="A folder: a new one, or that of a run to go on with.")
@click.option("--check", is_flag=True, help="Take one step of everything, write nothing.")
@AS_JSON
def learn(recipe: Path, out: Path | None, check: bool, as_json: bool) -> None:
    """Learn which channels matter, cut the others, and fine-tune what is left, as a recipe says.

    Gates train with the weights (ACPLI); fine-tuning can learn from teachers, the smallest first. A run that was killed
    goes on when it is started again.
    """
    if check:
        with redirect_stdout(sys.stderr):
            summary = recipes.check_recipe(recipe)
        if recipes.is_first_process():
            _show_check(recipe, summary, as_json)
        return
    if out is None:
        raise click.UsageError("Missing option '--out'; or give --check to try the recipe")
    was_finished = Summary.read(out) is not None
    with redirect_stdout(sys.stderr):  # what functions of the user's print is no result
        summary = recipes.run_recipe(recipe, out, tell=_tell)
    if recipes.is_first_process():
        _show(out, summary, was_finished, as_json)


def _tell(stage: str) -> None:
    """Name the stage on a terminal, above the bar of its training."""
    if sys.stderr.isatty() and recipes.is_first_process():
        click.echo(f"{stage} …", err=True)


def _show_check(recipe: Path, summary: Summary, as_json: bool) -> None:
    macs, parameters = summary.macs[0], summary.parameters[0]
    if as_json:
        facts = {"recipe": str(recipe), "target": summary.target, "macs": macs, "parameters": parameters}
        click.echo(json.dumps(facts | {"stages": list(summary.seconds)}, indent=2))
        return
    click.echo(
        f"{recipe} can be run: one step of {', '.join(summary.seconds)} went well, nothing was written\n"
        f"The model has {macs:,} MACs and {parameters:,} parameters; the target is macs = {summary.target}"
    )


def _show(out: Path, summary: Summary, was_finished: bool, as_json: bool) -> None:
    report = artifacts.read_report(out / "model")
    if as_json:
        facts = {"out": str(out), "was_finished": was_finished, **json.loads(summary.to_json())}
        click.echo(json.dumps(facts | {"report": dataclasses.asdict(report)}, indent=2))
        return
    click.echo(f"{report.totals()}\n\n{stage_table(summary.stages)}")
    if summary.measures:
        names = list(dict.fromkeys(name for row in summary.measures.values() for name in row))
        rows = [(stage, *(f"{row[name]:.4f}" for name in names)) for stage, row in summary.measures.items()]
        align = ("left", *("right" for _ in names))
        click.echo(f"\n{tabulate(rows, ['validation', *names], colalign=align, disable_numparse=True)}")
    show_notes(report.notes)
    click.echo(f"Trained: {', '.join(f'{name} {seconds:,.1f} s' for name, seconds in summary.seconds.items())}")
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    click.echo(f"{'Had been finished, nothing changed' if was_finished else 'Saved'} {out}: {', '.join(names)}")
