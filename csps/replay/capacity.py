"""The highest rate of a trace that a live server keeps up with."""

import asyncio
from dataclasses import replace
from itertools import count
from typing import Any

from rich.console import Console

from csps.records.capacity import (
    capacity_record,
    check_found,
    find_capacity,
    objective_of,
    rate_of,
)
from csps.records.rows import read_requests
from csps.records.summary import save
from csps.replay.run import ReplayConfig, replay
from csps.trace.schema import Trace

CAPACITY_FILE = "capacity.json"
SLOWEST = 8  # the search begins at --speed over this
DRAIN_S = 60.0  # where none is given: who has not ended then has missed the objective anyway


def find(trace: Trace, config: ReplayConfig, console: Console, tolerance: float) -> dict[str, Any]:
    """Play `trace` at one speed after another; what was found, also in capacity.json.

    Every speed is a run in a folder of its own under `config.out`, with prompts of its own: no
    run finds another's in the prefix cache. ConfigError without an objective, or if the lowest
    speed misses it.
    """
    objective = objective_of(config.slo_tbt_ms, config.slo_ttft_s)
    rate = rate_of([request.arrival_s for request in trace.requests])
    seeds = count(config.seed)

    def meets(speed: float) -> bool:
        per_second = speed * rate
        out = config.out / f"rate-{per_second:.4g}"
        run = replace(
            config,
            out=out,
            speed=speed,
            seed=next(seeds),
            drain_s=DRAIN_S if config.drain_s is None else config.drain_s,
            name=f"{config.name or trace.name} at {per_second:.3g}/s",
        )
        console.print(f"at {per_second:.3g} requests/s", highlight=False)
        asyncio.run(replay(trace, run, console))
        met = objective.met(read_requests(out))
        console.print(f"{per_second:.3g} requests/s: {'met' if met else 'missed'}", highlight=False)
        return met

    found = find_capacity(meets, config.speed / SLOWEST, config.speed, tolerance)
    record = capacity_record(found, objective, rate)
    save(config.out / CAPACITY_FILE, record)
    check_found(found, rate)
    return record
