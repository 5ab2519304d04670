"""The command line: each command builds a model, calls the façade and prints a table, or JSON for machines."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate
from tqdm import tqdm

from fxprune import api, artifacts
from fxprune.console import Commands, Progress
from fxprune.errors import SpecError
from fxprune.graph.dump import dump
from fxprune.graph.passes import Observer, Pass, PassEvent, changes, parse_spec
from fxprune.graph.tracing import trace
from fxprune.labels.attention import POLICIES, check_attention
from fxprune.labels.detection import find_orbits
from fxprune.labels.operators import NOTES, describe_operator, operator_rows
from fxprune.labels.orbits import Orbits
from fxprune.latency import measure_latency
from fxprune.report import LayerRow, Report
from fxprune.survey import make_report
from fxprune.zoo import BuiltModel, ModelSource, build_model
from passes import PASSES

__all__ = ["commands"]

_Command = Callable[..., None]


_PRUNING = ("build", "trace and mask", "select channels", "cut channels")

_AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")

_MODEL = (
    click.argument("model"),
    click.option(
        "--weights", metavar="NAME", help="The library's own weights, DEFAULT for its best; random otherwise."
    ),
    click.option(
        "--checkpoint", type=click.Path(path_type=Path), help="A state_dict to load: .safetensors, .pt or .pth."
    ),
    click.option("--seed", default=0, show_default=True, help="Of random weights, inputs and criteria."),
    click.option(
        "--input",
        "--input-size",
        "shapes",
        multiple=True,
        metavar="SHAPE",
        help="Shape of an example input, as 1x3x224x224 or 1x128:int64; repeat it for several inputs.",
    ),
    click.option("--frontend", default="auto", show_default=True, help="auto, symbolic or export."),
)

_ATTENTION = click.option(
    "--attention",
    default=POLICIES[0],
    show_default=True,
    metavar="WHAT",
    help="What leaves attention: dimensions, the same of every head, or heads, whole ones.",
)

_SELECTION = (
    click.option("--macs", metavar="AMOUNT", help="Multiply-accumulates to leave: 50% or 2e9."),
    click.option("--parameters", metavar="AMOUNT", help="Parameters to leave: 50% or 1e6."),
    click.option(
        "--ratio",
        multiple=True,
        metavar="[LAYER=]RATIO",
        help="Channels to remove: 30%; or of single layers, repeated: layer1.*=30%.",
    ),
    click.option("--criterion", default="l2", show_default=True, help="l1, l2, fpgm, bn-scale or random."),
    click.option("--scope", default="global", show_default=True, help="global or uniform."),
    click.option("--round-to", default=1, show_default=True, help="Kept channels are a multiple of this."),
    click.option("--min-width", default=1, show_default=True, help="Channels that stay in every orbit at least."),
    click.option("--max-ratio", default=1.0, show_default=True, help="Largest fraction that leaves any orbit."),
    click.option(
        "--include", multiple=True, metavar="LAYER", help="Only these layers: name, glob or type; repeatable."
    ),
    click.option("--exclude", multiple=True, metavar="LAYER", help="Not these layers: name, glob or type; repeatable."),
    click.option("--allow-statistical", is_flag=True, help="Also cut through layer norms, approximately."),
    _ATTENTION,
)


def _with(options: tuple[Callable[[_Command], _Command], ...]) -> Callable[[_Command], _Command]:
    return lambda command: functools.reduce(lambda done, option: option(done), reversed(options), command)


def _takes_model(command: _Command) -> _Command:
    """Add the argument and options that say which model, and hand them over as one `ModelSource`."""

    @functools.wraps(command)
    def gathered(
        model: str, weights: str | None, checkpoint: Path | None, shapes: tuple[str, ...], seed: int, **options: Any
    ) -> None:
        command(ModelSource(model, weights, checkpoint, shapes, seed), **options)

    return _with(_MODEL)(gathered)


@click.group(cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fxprune")
@click.pass_context
def commands(context: click.Context) -> None:
    """Make trained PyTorch models physically slimmer.

    MODEL is torchvision:NAME, timm:NAME, or path/to/file.py:callable, where the callable takes no argument and returns
    a module or a pair (module, example inputs).
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@commands.command()
@_takes_model
@_ATTENTION
@_AS_JSON
def inspect(source: ModelSource, frontend: str, attention: str, as_json: bool) -> None:
    """Show every layer's orbit and width, or what pins it, and what every operator that pins costs."""
    check_attention(attention)
    with Progress(("build", "trace", "find orbits"), quiet=as_json) as progress:
        built = build_model(source)
        progress.advance()
        graph = trace(built.model, built.inputs, frontend=frontend)
        progress.advance()
        orbits = find_orbits(graph, attention)
        report = make_report(graph, orbits)
    report = dataclasses.replace(report, notes=(*report.notes, *built.notes))
    _show_orbits(source.name, report, orbits, as_json)


def _show_orbits(name: str, report: Report, orbits: Orbits, as_json: bool) -> None:
    widths = {orbit.name: orbit.width for orbit in orbits}
    if as_json:
        rows = [dataclasses.asdict(row) | {"widths": [widths[o] for o in row.orbits]} for row in report.layers]
        facts = {"model": name, "macs": report.macs[0], "parameters": report.parameters[0], "notes": report.notes}
        facts |= {key: dataclasses.asdict(report)[key] for key in ("outputs", "pinning", "statistical")}
        click.echo(json.dumps(facts | {"layers": rows, "orbits": [_orbit_facts(orbits, o) for o in widths]}, indent=2))
        return
    header = ["layer", "type", "channels", "orbit × width", "state", "because of"]
    click.echo(tabulate([_layer_cells(row, widths) for row in report.layers], header, disable_numparse=True))
    click.echo(f"\n{report.causes()}")
    prunable = sum(orbit.width for orbit in orbits if orbit.statistical is None)
    macs, parameters = report.macs[0], report.parameters[0]
    click.echo(
        f"\n{name}: {len(orbits)} orbits, {prunable:,} classes of channels can leave exactly; "
        f"{macs:,} MACs, {parameters:,} parameters"
    )
    _show_notes(report.notes)


def _orbit_facts(orbits: Orbits, name: str) -> dict[str, Any]:
    orbit = orbits[name]
    return {
        "name": name,
        "width": orbit.width,
        "members": [f"{m.parameter}[{m.dimension}]" for m in orbit.members],
        "producers": orbit.producers,
        "absorbers": orbit.absorbers,
        "statistical": None if orbit.statistical is None else str(orbit.statistical),
    }


def _layer_cells(row: LayerRow, widths: Mapping[str, int]) -> tuple[str, ...]:
    shown = [f"{name} × {widths[name]}" for name in row.orbits[:3]]
    more = [f"{len(row.orbits) - 3} more"] if len(row.orbits) > 3 else []
    return (row.layer, row.kind, f"{row.channels[0]:,}", ", ".join(shown + more), row.state, row.reason)


def _show_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        click.echo(f"Note: {note}")


@commands.command()
@_takes_model
@_with(_SELECTION)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder for the slim model.")
@click.option("--pt2", is_flag=True, help="Also write model.pt2 (torch.export).")
@click.option("--onnx", is_flag=True, help="Also write model.onnx; needs the extra 'export'.")
@click.option("--latency", is_flag=True, help="Measure the time of one run before and after.")
@click.option("--print-changes", "changes", is_flag=True, help="Print what each pass changed.")
@_AS_JSON
def prune(source: ModelSource, out: Path, as_json: bool, **options: Any) -> None:
    """Remove the least important channels and save the slim model."""
    artifacts.check_free(out.absolute())
    stages = (*_PRUNING, *(("measure",) if options["latency"] else ()), "save")
    with Progress(stages, quiet=as_json) as progress:
        built = build_model(source)
        progress.advance()
        result = _prune(built, source, progress, as_json, options)
        api.save(result, out, pt2=options["pt2"], onnx=options["onnx"])
    if as_json:
        facts = {"model": source.name, "out": str(out), "spec": result.plan.spec, "seed": result.plan.seed}
        click.echo(json.dumps(facts | {"report": dataclasses.asdict(result.report)}, indent=2))
        return
    click.echo(result.report.totals())
    _show_notes(result.report.notes)
    click.echo(f"Saved {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _prune(
    built: BuiltModel, source: ModelSource, progress: Progress, as_json: bool, options: dict[str, Any]
) -> api.Result:
    def show_changes(event: PassEvent) -> None:
        tqdm.write(changes(event), file=sys.stderr if as_json else sys.stdout)

    observers: tuple[Observer, ...] = (progress.advance,)
    if options["changes"]:
        observers = (show_changes, *observers)
    ours = ("pt2", "onnx", "latency", "changes", "ratio")
    wanted = {key: value for key, value in options.items() if key not in ours}
    result = api.prune(
        built.model, built.inputs, ratio=_ratio(options["ratio"]), seed=source.seed, observers=observers, **wanted
    )
    latency = None
    if options["latency"]:
        latency = measure_latency(built.model, result.module, built.inputs)
        progress.advance()
    return dataclasses.replace(result, notes=built.notes, latency_ms=latency)


def _ratio(given: tuple[str, ...]) -> str | dict[str, Any] | None:
    """Read `30%`, or `LAYER=30%` any number of times."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    pairs = [item.rpartition("=") for item in given]
    if any(not layer for layer, _, _ in pairs):
        raise SpecError("several --ratio need a layer each: --ratio layer1.*=30% --ratio layer2.*=50%")
    return {layer: ratio for layer, _, ratio in pairs} or None


@commands.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@_AS_JSON
def show(folder: Path, markdown: bool, as_json: bool) -> None:
    """Show the report of a saved model."""
    plan, report = artifacts.read_plan_file(folder), artifacts.read_report(folder)
    if as_json:
        facts = {"model": plan.model, "spec": plan.spec, "seed": plan.seed, "versions": plan.versions}
        click.echo(json.dumps(facts | {"report": dataclasses.asdict(report)}, indent=2))
        return
    made = ", ".join(f"{name} {number}" for name, number in (plan.versions or {}).items())
    click.echo(f"{plan.model}: {plan.spec} (seed {plan.seed}; {made})\n")
    click.echo(report.markdown() if markdown else report.table())


@commands.command()
@click.argument("folder", type=click.Path(path_type=Path))
def diff(folder: Path) -> None:
    """Show what pruning changed in the graph of a saved model."""
    click.echo(artifacts.read_diff(folder), nl=False)


@commands.command("passes")
@_AS_JSON
def list_passes(as_json: bool) -> None:
    """List the passes and their options."""
    rows = [_facts(kind) for kind in PASSES]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = [(row["name"], row["does"]) for row in rows]
    click.echo(tabulate(table, ["pass", "what it does"]))
    options = [(row["name"], option, str(default or "–")) for row in rows for option, default in row["options"].items()]
    click.echo("\n" + tabulate(options, ["pass", "option", "default"], disable_numparse=True))


def _facts(kind: type[Pass]) -> dict[str, Any]:
    """Return a pass's name, what a spec may say of it, and what it does. Options that take objects have no spelling."""
    fields = [f for f in dataclasses.fields(kind) if f.compare]
    first = (kind.__doc__ or "").strip().splitlines()[0]
    return {"name": kind.name, "does": first, "options": {f.name: f.default for f in fields}}


@commands.command()
@click.argument("operator", required=False)
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@_AS_JSON
def operators(operator: str | None, markdown: bool, as_json: bool) -> None:
    """List the operators that have a rule, or say what becomes of channels at one OPERATOR, as aten.add."""
    rows = [dataclasses.asdict(row) for row in (describe_operator(operator) if operator else operator_rows())]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    title = "# Operators and their rules\n\nGenerated by `fxprune operators --markdown`.\n\n" if markdown else ""
    cells = [tuple(row.values()) for row in rows]
    table = tabulate(cells, ["operator", "family", "what becomes of channels"], "github" if markdown else "simple")
    notes = () if operator else NOTES
    click.echo("\n\n".join([title + table, *notes]) if markdown else "\n".join([table, *notes]))


@commands.command()
@click.option("--passes", "spec", required=True, metavar="SPEC", help="As mask-insertion,channel-selection{macs=50%}.")
@_takes_model
@_AS_JSON
def run(source: ModelSource, spec: str, frontend: str, as_json: bool) -> None:
    """Run passes on a model; print what each changed, and the final graph."""
    stages = ("build", *(step.name for step in parse_spec(spec, PASSES)))
    events: list[dict[str, Any]] = []
    with Progress(stages, quiet=as_json) as progress:
        built = build_model(source)
        progress.advance()

        def observe(event: PassEvent) -> None:
            facts = {"name": event.name, "modified": event.modified, "seconds": event.seconds}
            events.append(facts | {"changes": changes(event)})
            if not as_json:
                tqdm.write(events[-1]["changes"])
            progress.advance()

        graph = api.run_passes(built.model, built.inputs, spec, frontend=frontend, observers=(observe,))
    if as_json:
        click.echo(
            json.dumps({"model": source.name, "notes": built.notes, "passes": events, "dump": dump(graph)}, indent=2)
        )
        return
    click.echo(f"--- {source.name} after {spec}")
    click.echo(dump(graph))
    _show_notes(built.notes)
