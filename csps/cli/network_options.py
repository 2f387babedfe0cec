"""Flags of `csps serve` about where it listens; their defaults stand with `serve`."""

from pathlib import Path
from typing import Annotated

import typer

from csps.rpc.auth import KEY_FLAG

_PANEL = "Server"

Host = Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_PANEL)]
Port = Annotated[
    int,
    typer.Option(min=0, max=65535, help="gRPC port; 0 picks a free one.", rich_help_panel=_PANEL),
]
HttpPort = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help="Also serve OpenAI's protocol, at http://HOST:PORT/v1 (https with --tls-cert): chat "
        "completions, completions, models. 0 picks a free port, which is printed. Default: none.",
        rich_help_panel=_PANEL,
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        KEY_FLAG,
        help="Callers must show one of the API keys in this file, one a line (# begins a comment); "
        "health and reflection stay open. Default: nobody is asked.",
        rich_help_panel=_PANEL,
    ),
]
Control = Annotated[
    str,
    typer.Option(
        help="HOST:PORT where ranks join; keep it inside the cluster.", rich_help_panel=_PANEL
    ),
]
CollectiveTimeout = Annotated[
    float,
    typer.Option(
        min=1, help="Seconds after which a stuck collective fails.", rich_help_panel=_PANEL
    ),
]
ReadyFile = Annotated[
    Path | None,
    typer.Option(
        help="Written once the server is ready, as JSON with its port: for scripts.",
        rich_help_panel=_PANEL,
    ),
]
LogLevel = Annotated[str, typer.Option(help="DEBUG, INFO, ...", rich_help_panel=_PANEL)]
