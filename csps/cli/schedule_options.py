"""Flags of `csps serve` about who runs when; their defaults stand with `serve`."""

from typing import Annotated

import typer

from csps.core.plan import Layout

_PANEL = "Scheduling"

LongTokens = Annotated[
    int,
    typer.Option(
        min=1,
        help="Prompts at least this long are split over all ranks.",
        rich_help_panel=_PANEL,
    ),
]
StageTokens = Annotated[
    int,
    typer.Option(
        min=0,
        help="csps, ring: new tokens of one prefill step. A short prompt waits for one step "
        "at most. 0: 4,096 on GPUs, 2,048 on CPUs.",
        rich_help_panel=_PANEL,
    ),
]
TokenBudget = Annotated[
    int,
    typer.Option(
        min=1,
        help="sarathi, shift: new tokens of one step, decoded ones included.",
        rich_help_panel=_PANEL,
    ),
]
FixedLayout = Annotated[
    Layout | None,
    typer.Option(
        help="Steps of shift, and decode steps of csps: sp splits their tokens over ranks, tp "
        "the weights. Default: the cheaper one, by a cost model fitted to steps that are "
        "measured at start-up.",
        rich_help_panel=_PANEL,
    ),
]
ShiftThreshold = Annotated[
    int,
    typer.Option(
        min=0,
        help="In place of the cost model: steps of more tokens have layout sp, others tp.",
        rich_help_panel=_PANEL,
    ),
]
ProbeEvery = Annotated[
    int,
    typer.Option(
        min=0,
        help="Every so many steps, one has the layout that the cost model did not choose, so "
        "that step records show what either takes. 0: never.",
        rich_help_panel=_PANEL,
    ),
]
TbtTarget = Annotated[
    float,
    typer.Option(
        help="csps, ring: milliseconds between tokens that will do. While prompts are "
        "prefilled, decode then takes no step sooner, and prompts are done earlier. 0: tokens "
        "as soon as they can be had.",
        rich_help_panel=_PANEL,
    ),
]
Ageing = Annotated[
    float,
    typer.Option(
        min=0.01,
        help="csps, ring: the shortest remaining prompt goes first, but each token prefilled "
        "since a request's arrival counts as this many off its own. Large: first come, "
        "first served.",
        rich_help_panel=_PANEL,
    ),
]
PrefillRanks = Annotated[
    str,
    typer.Option(
        help="csps, ring: ranks that prefill, such as 0-2 or 0,2; the others answer queries "
        "alone. Default: all.",
        rich_help_panel=_PANEL,
    ),
]
DecodeRanks = Annotated[
    str,
    typer.Option(
        help="csps, ring: ranks that decode, and keep the KV of new tokens. Default: all.",
        rich_help_panel=_PANEL,
    ),
]
PrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Begin a prompt behind what its KV is there of, from earlier ones.",
        rich_help_panel=_PANEL,
    ),
]
AsyncScheduling = Annotated[
    bool,
    typer.Option(
        "--async-scheduling/--no-async-scheduling",
        help="Plan a step that decodes while the one before it runs, so that ranks go on at once. "
        "A sequence that turns out to have ended is then computed once in vain.",
        rich_help_panel=_PANEL,
    ),
]
MaxRunning = Annotated[
    int,
    typer.Option(
        "--max-running",
        "--max-num-seqs",
        min=1,
        help="Requests that hold KV at a time.",
        rich_help_panel=_PANEL,
    ),
]
MaxWaitingTokens = Annotated[
    int,
    typer.Option(
        min=1,
        help="Queued prompt tokens above which requests are refused.",
        rich_help_panel=_PANEL,
    ),
]
