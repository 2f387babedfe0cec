"""The highest rate of a trace that a live server keeps up with."""

import asyncio
from dataclasses import replace
from typing import Any

from rich.console import Console

from csps.core.errors import ConfigError
from csps.records.capacity import Objective, find_capacity
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
    objective = Objective(tbt_ms=config.slo_tbt_ms, ttft_s=config.slo_ttft_s)
    if objective.tbt_ms is None and objective.ttft_s is None:
        raise ConfigError("--find-capacity: give what must be met: --slo-tbt, --slo-ttft or both")
    span_s = trace.requests[-1].arrival_s - trace.requests[0].arrival_s
    if not span_s:
        raise ConfigError("--find-capacity: all requests of the trace arrive at once")
    rate = len(trace.requests) / span_s
    tried: list[dict[str, Any]] = []

    def meets(speed: float) -> bool:
        per_second = speed * rate
        out = config.out / f"rate-{per_second:.4g}"
        run = replace(
            config,
            out=out,
            speed=speed,
            seed=config.seed + len(tried),
            drain_s=DRAIN_S if config.drain_s is None else config.drain_s,
            name=f"{config.name or trace.name} at {per_second:.3g}/s",
        )
        console.print(f"at {per_second:.3g} requests/s", highlight=False)
        asyncio.run(replay(trace, run, console))
        met = objective.met(read_requests(out))
        tried.append({"requests_per_s": per_second, "speed": speed, "met": met, "run": out.name})
        console.print(f"{per_second:.3g} requests/s: {'met' if met else 'missed'}", highlight=False)
        return met

    found = find_capacity(meets, config.speed / SLOWEST, config.speed, tolerance)
    record = {
        "requests_per_s": found.highest * rate,
        "speed": found.highest,
        "slo_tbt_ms": objective.tbt_ms,
        "slo_ttft_s": objective.ttft_s,
        "median_queue_s": objective.median_queue_s,
        "tried": tried,
    }
    save(config.out / CAPACITY_FILE, record)
    if not found.highest:
        raise ConfigError(
            f"--find-capacity: missed even at {config.speed / SLOWEST * rate:.3g} requests/s: give "
            "a lower --speed to start from"
        )
    return record
