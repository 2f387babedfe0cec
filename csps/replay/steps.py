"""Records the steps of a live server while a trace is played to it."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from csps.core.errors import CspsError
from csps.records.rows import StepRow
from csps.rpc.client import GenerationClient


async def record_steps(
    client: GenerationClient,
    add: Callable[[StepRow], None],
    begun: float,
    ready: asyncio.Event,
    console: Console,
) -> None:
    """Hand each step to `add`, its times from `begun` (of time.time), until cancelled.

    `ready` is set when the server has begun to tell them, or cannot. A server on another machine
    has another clock: its steps are as far off as the clocks are. Steps that could not be had are
    said, and the run goes on.
    """
    lost = 0
    try:
        async for batch in client.watch_steps():
            ready.set()
            for row in batch.rows:
                started_s, ended_s = row.started_s - begun, row.ended_s - begun
                add(replace(row, started_s=started_s, ended_s=ended_s))
            if batch.dropped and not lost:
                console.print("[yellow]warning[/]: steps come too fast: records of some are lost")
            lost += batch.dropped
    except CspsError as error:
        console.print(f"[yellow]warning[/]: no more records of steps: {error}", soft_wrap=True)
    finally:
        ready.set()
