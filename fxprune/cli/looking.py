"""Look at models and at saved folders: `inspect`, `show`, `diff`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from fxprune import artifacts
from fxprune.cli.options import AS_JSON, ATTENTION, commands, show_notes, takes_model
from fxprune.console import Progress
from fxprune.graph.tracing import trace
from fxprune.labels.attention import check_attention
from fxprune.labels.detection import find_orbits
from fxprune.labels.orbits import Orbits
from fxprune.report import LayerRow, Report
from fxprune.survey import make_report
from fxprune.zoo import ModelSource, build_model


@commands.command()
@takes_model
@ATTENTION
@AS_JSON
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
    show_notes(report.notes)


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


@commands.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@AS_JSON
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
