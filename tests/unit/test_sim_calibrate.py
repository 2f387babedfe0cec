"""Fits of steps whose coefficients are known."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csps.core.errors import ConfigError
from csps.core.plan import Lane, Layout
from csps.core.strategy import Strategy
from csps.records.rows import STEPS_FILE, StepRow, write_rows
from csps.records.run import RunInfo, RunKind, write_run
from csps.sched.cost import CostModel, StepShape
from csps.sim.calibrate import calibrate
from csps.sim.cluster import CalibratedCluster, load_cluster
from csps.sim.config import SimConfig
from csps.sim.run import simulate
from tests.unit.simulating import MODEL, request, trace

TRUTH = {
    Lane.PREFILL: CostModel(0.01, 1e-4, 0.0, 2e-8, 0.0),
    Lane.DECODE: CostModel(0.02, 0.0, 2e-3, 0.0, 1e-6),
}
# Of the speed, beside a step of the other lane with so many tokens.
LOST = {Lane.PREFILL: {1: 0.2, 8: 0.6}, Lane.DECODE: {500: 0.5}}
DELAY_S = {Lane.PREFILL: 0.0, Lane.DECODE: 0.03}
# Every third step of the decode lane ships queries.
SPREAD_S = {Lane.PREFILL: 0.0, Lane.DECODE: 0.05}
STEP_S = {Lane.PREFILL: 0.004, Lane.DECODE: 0.002}

INFO = RunInfo(
    name="live",
    kind=RunKind.LIVE,
    strategy="csps",
    model="SmolLM2-135M",
    ranks=2,
    trace="t",
    num_requests=1,
    elapsed_s=1.0,
    block_size=16,
    pages_per_rank=500,
    settings={"sp": 2, "tp": 1, "stage_tokens": 4096},
)


def lane_steps(lane: Lane, seed: int, start: float, lost: float = 0.0) -> Iterator[StepRow]:
    """Steps of a busy lane, each with another shape, that lose that much of their speed."""
    draw = random.Random(seed)
    now = start
    for step_id in range(40):
        if lane is Lane.PREFILL:
            tokens, context = draw.randrange(2, 2000), draw.randrange(4000)
            shape = StepShape(tokens, 1, tokens * context + tokens * (tokens + 1) // 2, 0)
        else:
            sequences = draw.randrange(1, 30)
            shape = StepShape(sequences, sequences, 0, sequences * draw.randrange(1, 5000))
        spread = lane is Lane.DECODE and step_id % 3 == 0
        alone_s = TRUTH[lane].predict(shape) + SPREAD_S[lane] * spread
        seconds = alone_s / (1 - lost) + (DELAY_S[lane] if lost else 0.0)
        ended = now + STEP_S[lane] + seconds
        yield StepRow(
            lane, step_id, now, ended, Layout.SP, *shape,
            (seconds, seconds / 2), (seconds, 0.0), (0.0, 0.0), (0.0, 0.0),
            bytes_sent={"query": 100 * spread},
        )  # fmt: skip
        now = ended


def live_run(folder: Path, info: RunInfo = INFO) -> Path:
    folder.mkdir()
    write_run(folder, info)
    rows = [
        *lane_steps(Lane.PREFILL, 1, 0.0),
        *lane_steps(Lane.DECODE, 2, 1000.0),
    ]
    for seed, (lane, other, tokens) in enumerate(
        [
            (Lane.PREFILL, Lane.DECODE, 1),
            (Lane.PREFILL, Lane.DECODE, 8),
            (Lane.DECODE, Lane.PREFILL, 500),
        ]
    ):
        steps = list(lane_steps(lane, 3 + seed, 2000.0 + 1000.0 * seed, LOST[lane][tokens]))
        rows += [*steps, _over(steps, other, tokens)]
    write_rows(folder / STEPS_FILE, rows)
    return folder


def _over(steps: list[StepRow], lane: Lane, num_tokens: int) -> StepRow:
    """One step of another lane for as long as `steps` take, of a layout that has no model."""
    started, ended = steps[0].started_s, steps[-1].ended_s
    return replace(
        steps[0],
        lane=lane,
        layout=Layout.TP,
        num_tokens=num_tokens,
        started_s=started,
        ended_s=ended,
        wall_s=(ended - started,) * 2,
    )


def test_coefficients_come_back(tmp_path: Path) -> None:
    path = tmp_path / "fitted.toml"
    path.write_text(calibrate([live_run(tmp_path / "run")], "here"))
    cluster = load_cluster(path)
    assert isinstance(cluster, CalibratedCluster)
    server = cluster.server(Strategy.CSPS)
    assert (server.sp, server.tp, server.block_size, server.pages_per_rank) == (2, 1, 16, 500)
    assert server.stage_tokens == 4096
    shapes = [StepShape(5, 5, 0, 9000), StepShape(1000, 1, 2_000_000, 0)]
    for lane, fitted in server.lanes.items():
        shape = shapes[lane is Lane.PREFILL]
        assert set(fitted.models) == {Layout.SP}
        assert fitted.models[Layout.SP].predict(shape) == pytest.approx(
            TRUTH[lane].predict(shape), rel=0.02
        )
        assert fitted.spread_s == pytest.approx(SPREAD_S[lane], rel=0.05)
        assert fitted.delay_s == pytest.approx(DELAY_S[lane], rel=0.1, abs=1e-3)
        for tokens, lost in LOST[lane].items():
            found = [item.lost for item in fitted.beside if item.tokens <= tokens][-1]
            assert found == pytest.approx(lost, rel=0.05)
        assert fitted.step_s == pytest.approx(STEP_S[lane], rel=0.01)


def test_what_was_fitted_can_be_simulated(tmp_path: Path) -> None:
    path = tmp_path / "fitted.toml"
    path.write_text(calibrate([live_run(tmp_path / "run")], "here"))
    cluster = load_cluster(path)
    asked = [request(0.0, 1000, 3, 0), request(0.05, 100, 3, 5000)]
    result = simulate(trace(asked), cluster, MODEL, SimConfig())
    assert (result.run.cluster, result.run.ranks, result.run.block_size) == ("here", 2, 16)
    first = min(result.steps, key=lambda step: step.ended_s)
    expected = TRUTH[Lane.PREFILL].predict(StepShape(1000, 1, 500_500, 0))
    assert first.wall_s == pytest.approx((expected,), rel=0.02)
    assert first.ended_s == pytest.approx(expected + STEP_S[Lane.PREFILL], rel=0.02)
    with pytest.raises(ConfigError, match="calibrated for csps, not ring"):
        simulate(trace(asked), cluster, MODEL, SimConfig(strategy=Strategy.RING))
    with pytest.raises(ConfigError, match="--replicas"):
        simulate(trace(asked), cluster, MODEL, SimConfig(replicas=2))


def test_a_lane_that_never_ran_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(folder, INFO)
    decode = list(lane_steps(Lane.DECODE, 4, 0.0))
    write_rows(folder / STEPS_FILE, [_over(decode, Lane.PREFILL, 300), *decode])
    with pytest.raises(ConfigError, match="steps ran alone: add a run"):
        calibrate([folder], "here")


def test_simulated_runs_are_no_evidence(tmp_path: Path) -> None:
    folder = live_run(tmp_path / "run", replace(INFO, kind=RunKind.SIMULATED))
    with pytest.raises(ConfigError, match="is simulated"):
        calibrate([folder], "here")


def test_runs_of_two_servers_do_not_mix(tmp_path: Path) -> None:
    one = live_run(tmp_path / "one")
    two = live_run(tmp_path / "two", replace(INFO, ranks=4))
    with pytest.raises(ConfigError, match="two: another server"):
        calibrate([one, two], "here")


@pytest.mark.parametrize("strategy", Strategy)
def test_the_cluster_that_was_measured(strategy: Strategy) -> None:
    """The shipped file has every strategy, and a prompt of 4,000 tokens takes it seconds."""
    asked = [request(0.0, 4000, 20, 0), request(1.0, 100, 20, 5000)]
    result = simulate(trace(asked), load_cluster("cpu2"), MODEL, SimConfig(strategy=strategy))
    assert all(row.output_tokens == 20 for row in result.requests)
    assert 1.0 < result.summary()["latency"]["ttft_s"]["mean"] < 60.0
