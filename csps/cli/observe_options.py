"""Flags of `csps serve` for those who watch it; their defaults stand with `serve`."""

from pathlib import Path
from typing import Annotated

import typer

_PANEL = "Observation"

StepLog = Annotated[
    Path | None,
    typer.Option(
        help="Append a JSON line for every step: layout, tokens, times, bytes.",
        rich_help_panel=_PANEL,
    ),
]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help="Serve Prometheus metrics at http://HOST:PORT/metrics, and those of rank r, where "
        "ranks are started here, at PORT + 1 + r. 0 picks free ports, which are printed. "
        "Default: none.",
        rich_help_panel=_PANEL,
    ),
]
OtlpEndpoint = Annotated[
    str,
    typer.Option(
        help="Send OpenTelemetry spans of every request (queue, prefill steps, decode) to this "
        "OTLP gRPC receiver, such as http://localhost:4317. Needs the package's extra, otel.",
        rich_help_panel=_PANEL,
    ),
]
