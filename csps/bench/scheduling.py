"""`bench scheduling`: what lies between decode steps, planned one ahead or each after the last."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from csps.bench.measure import ServerFlags, request
from csps.bench.server import ServerProcess
from csps.core.strategy import Strategy
from csps.rpc.client import GenerationClient

WAYS = {"async": "--async-scheduling", "sync": "--no-async-scheduling"}
FIXED_LAYOUT = ("--layout", "sp")  # nothing to measure at start


@dataclass(frozen=True, slots=True)
class Load:
    """Streams side by side, each with `context` tokens before its `output`."""

    batches: tuple[int, ...]
    context: int
    output: int
    repeats: int


async def scheduling(
    flags: ServerFlags, strategies: Sequence[Strategy], load: Load, prompt: list[int]
) -> list[dict[str, object]]:
    """By strategy and batch: both ways in turn, on a server of its own each time."""
    rows = []
    for strategy in strategies:
        runs: dict[str, list[dict[int, float]]] = {way: [] for way in WAYS}
        for repeat in range(load.repeats):
            # Whichever is first finds another machine: they take turns at it.
            for way in sorted(WAYS, reverse=repeat % 2 == 1):
                extra = ("--strategy", strategy.value, *FIXED_LAYOUT, WAYS[way], *flags.extra)
                runs[way].append(await _serve(replace(flags, extra=extra), load, prompt))
        rows += [_row(strategy, batch, runs) for batch in load.batches]
    return rows


async def _serve(flags: ServerFlags, load: Load, prompt: list[int]) -> dict[int, float]:
    with ServerProcess(*flags.arguments()) as server:
        async with GenerationClient(server.target) as client:
            await request(client, prompt[: load.context], 4)
            return {batch: await _decode(client, load, batch, prompt) for batch in load.batches}


async def _decode(client: GenerationClient, load: Load, batch: int, prompt: list[int]) -> float:
    """Median time between two tokens of a stream, in ms."""
    contexts = [prompt[at : at + load.context] for at in range(batch)]
    measured = await asyncio.gather(*(request(client, ids, load.output) for ids in contexts))
    # While all of them run: the others' prefill is not decode.
    begun = max(stream.arrivals[0] for stream in measured)
    gaps = [
        later - earlier
        for stream in measured
        for earlier, later in pairwise(stream.arrivals)
        if earlier >= begun
    ]
    return 1e3 * median(gaps)


def _row(
    strategy: Strategy, batch: int, runs: dict[str, list[dict[int, float]]]
) -> dict[str, object]:
    gaps = {way: [run[batch] for run in all_runs] for way, all_runs in runs.items()}
    pairs = zip(gaps["async"], gaps["sync"], strict=True)
    ratios = sorted(one / other for one, other in pairs)
    return {
        "strategy": strategy.value,
        "batch": batch,
        "async_tbt_ms": median(gaps["async"]),
        "sync_tbt_ms": median(gaps["sync"]),
        "async/sync": median(ratios),
        "ratios": ratios,
        "tbt_ms": gaps,
    }
