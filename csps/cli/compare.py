"""`csps compare`: runs side by side."""

import importlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from csps.bench.record import check_writable
from csps.records.comparison import Comparison, best, texts
from csps.records.comparison import compare as compare_runs
from csps.records.summary import save


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Runs: folders of csps replay or csps simulate."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html, comparison.json and figures (PNG and SVG)."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Name of the run that ratios refer to; default: the first."),
    ] = None,
    slo_ttft: Annotated[
        float | None,
        typer.Option(min=0.0, help="Seconds to the first token that count as good; default: "
                     "what each run was given."),
    ] = None,
    slo_tbt: Annotated[
        float | None,
        typer.Option(min=0.0, help="Milliseconds that the p99 of a request's gaps may have, "
                     "likewise."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the comparison here besides.")
    ] = None,
) -> None:  # fmt: skip
    """Put runs side by side: a table of means and p99s, with --out a report of all.

    csps compare runs/csps runs/sarathi --out docs/results/first

    csps compare runs/* --baseline sarathi --slo-ttft 5 --slo-tbt 200

    Everything is worked out anew from the runs' records; report.html needs nothing beside it.
    """
    check_writable(json_file)
    comparison = compare_runs(folders, baseline, slo_ttft, slo_tbt)
    console = Console()
    _show(console, comparison)
    if json_file is not None:
        save(json_file, comparison.to_json())
    if out is not None:
        # matplotlib takes a second to import.
        report = importlib.import_module("csps.records.report")
        console.print(f"report: {report.write_report(comparison, out)}", highlight=False)


def _show(console: Console, comparison: Comparison) -> None:
    for note in comparison.notes:
        console.print(Text(note, style="yellow"))
    table = Table(caption=_caption(comparison))
    table.add_column("", no_wrap=True)
    for one in comparison.runs:
        table.add_column(Text(one.label), justify="right", overflow="fold")
    for metric, cells in comparison.table():
        if metric.path[-1] in ("p50", "p90"):
            continue  # the report has them
        name = f"{metric.title} ({metric.unit})" if metric.unit else metric.title
        found = best(metric, cells)
        row = [
            Text(" ".join(texts(cell)).strip(), style="bold" if i in found else "")
            for i, cell in enumerate(cells)
        ]
        table.add_row(name, *row)
    console.print(table)


def _caption(comparison: Comparison) -> str | None:
    said = []
    if len(comparison.runs) > 1:
        said.append(f"×: ratio to {escape(comparison.runs[0].label)}; bold: the best")
    if any(cell.at_least for _, cells in comparison.table() for cell in cells):
        said.append("≥: lower bound, some requests had not ended")
    return "; ".join(said) or None
