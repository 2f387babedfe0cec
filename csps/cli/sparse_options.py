"""Flags of `csps serve` that say how prompts are prefilled; their defaults stand with `serve`."""

from typing import Annotated

import typer

from csps.core.attention import AttentionKind, Estimate, Wire

_PANEL = "Attention of prefill"

Attention = Annotated[
    AttentionKind | None,
    typer.Option(
        help="dense: exact. csa: the KV blocks that hold most of the attention, with measured "
        "recall. csa-distance: near blocks, a baseline. A request may choose another. "
        "Default: csa with --strategy csps, else dense.",
        rich_help_panel=_PANEL,
    ),
]
Gamma = Annotated[
    float,
    typer.Option(help="Share of attention mass csa keeps; 1: all.", rich_help_panel=_PANEL),
]
MinRecall = Annotated[
    float,
    typer.Option(
        help="A head whose measured recall may be lower widens gamma, then runs dense.",
        rich_help_panel=_PANEL,
    ),
]
MinRecallP5 = Annotated[
    float,
    typer.Option(
        help="The same for the recall that 95% of a head's rows reach: rare sharp rows.",
        rich_help_panel=_PANEL,
    ),
]
MaxDensity = Annotated[
    float,
    typer.Option(
        help="A head that would keep a larger share of its blocks runs dense.",
        rich_help_panel=_PANEL,
    ),
]
MinTokens = Annotated[
    int,
    typer.Option(min=1, help="Shorter prompts are always dense.", rich_help_panel=_PANEL),
]
Rows = Annotated[
    int,
    typer.Option(
        help="Query rows per head and block that choose; more choose better and cost more.",
        rich_help_panel=_PANEL,
    ),
]
ByEstimate = Annotated[
    Estimate,
    typer.Option(
        help="What blocks are chosen by: sampled query rows, or mean keys.",
        rich_help_panel=_PANEL,
    ),
]
Window = Annotated[
    int,
    typer.Option(help="Blocks csa-distance keeps whole.", rich_help_panel=_PANEL),
]
OnWire = Annotated[
    Wire, typer.Option(help="Type of fetched keys and values.", rich_help_panel=_PANEL)
]
Pipeline = Annotated[
    str,
    typer.Option(
        help="on: communicate beside computation. off: one after the other, to compare.",
        rich_help_panel=_PANEL,
    ),
]
