"""Runs `csps simulate`: a bar, the search for capacity, the first figures."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from csps.cli.terminal import console
from csps.records.capacity import (
    capacity_record,
    check_found,
    find_capacity,
    objective_of,
    rate_of,
)
from csps.trace.schema import Trace

if TYPE_CHECKING:
    from csps.sim.config import SimConfig
    from csps.sim.run import SimResult

# Times that progress is shown.
UPDATES = 200


def play(
    run: Any, trace: Trace, cluster: Any, model: Any, config: "SimConfig", title: str
) -> "SimResult":
    """Simulate, with a bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} requests, {task.fields[now_s]:.0f} s simulated"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        total = len(trace.requests)
        task = bar.add_task(title, total=total, now_s=0.0)
        every = max(total // UPDATES, 1)

        def report(done: int, _: int, now_s: float) -> None:
            if done % every == 0:
                bar.update(task, completed=done, now_s=now_s)

        result: SimResult = run.simulate(trace, cluster, model, config, report)
    return result


def at_capacity(
    simulated: Callable[["SimConfig", str], "SimResult"],
    config: "SimConfig",
    trace: Trace,
    tolerance: float,
) -> tuple["SimConfig", dict[str, Any]]:
    """The settings at the highest speed that meets the objective, and what was found."""
    objective = objective_of(config.slo_tbt_ms, config.slo_ttft_s)
    rate = rate_of([request.arrival_s for request in trace.requests])

    def meets(speed: float) -> bool:
        tried = replace(config, speed=speed, keep_steps=False)
        result = simulated(tried, f"simulated at {speed * rate:.3g} requests/s")
        if result.run.interrupted:
            raise KeyboardInterrupt
        met = objective.met(result.requests)
        verdict = "met" if met else "missed"
        console.print(f"simulated: {speed * rate:.3g} requests/s: {verdict}", highlight=False)
        return met

    found = find_capacity(meets, config.speed / 16, config.speed, tolerance)
    check_found(found, rate)
    record = {"simulated": True, **capacity_record(found, objective, rate)}
    return replace(config, speed=found.highest), {"capacity": record}


def show(summary: dict[str, Any]) -> None:
    """The figures that everyone asks for first."""
    latency, throughput = summary["latency"], summary["throughput"]
    requests = summary["requests"]
    rows = [f"requests {requests['count']}, done {requests['done']}, failed {requests['failed']}"]
    for key in ("ttft_s", "tbt_ms", "response_s", "queue_s"):
        values = latency[key]
        if values["mean"] is not None:  # None where no request got so far
            rows.append(f"{key} mean {values['mean']:.4g}, p99 {values['p99']:.4g}")
    for key, value in throughput.items():
        if isinstance(value, int | float):
            rows.append(f"{key} {value:,.1f}")
    for row in rows:
        console.print(f"simulated: {row}", highlight=False)
