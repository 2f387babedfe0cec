"""Properties of whole simulated runs."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from csps.core.errors import ConfigError
from csps.core.plan import Lane
from csps.core.strategy import Strategy
from csps.records.rows import Status
from csps.sim.cluster import load_cluster
from csps.sim.config import SimConfig
from csps.sim.model import load_model
from csps.sim.run import simulate
from csps.trace.schema import TraceRequest, read_trace, write_trace
from tests.unit.simulating import CLUSTER, MODEL, request, run, settings, trace

FEW = hypothesis_settings(max_examples=12, deadline=None)


@st.composite
def requests(draw: st.DrawFn) -> list[TraceRequest]:
    """Up to ten, of which some begin alike."""
    return [
        request(
            arrival_s=draw(st.floats(0, 0.5)),
            prompt_tokens=draw(st.integers(1, 300)),
            output_tokens=draw(st.integers(1, 40)),
            first_block=1000 * draw(st.integers(0, 2)),
            session=draw(st.integers(0, 3)),
        )
        for _ in range(draw(st.integers(1, 10)))
    ]


@FEW
@given(requests(), st.sampled_from(Strategy), st.booleans())
def test_tokens_in_are_tokens_out(
    asked: list[TraceRequest], strategy: Strategy, separate_decode: bool
) -> None:
    result = run(asked, strategy, separate_decode=separate_decode)
    assert [row.status for row in result.requests] == [Status.DONE] * len(asked)
    assert all(row.output_tokens == row.wanted_tokens for row in result.requests)
    assert all(len(row.gaps_ms) == row.output_tokens - 1 for row in result.requests)
    # The last token of an answer is drawn, and computed never; nothing was preempted.
    rows = result.requests
    todo = sum(row.prompt_tokens - row.cached_tokens + row.output_tokens - 1 for row in rows)
    assert sum(step.num_tokens for step in result.steps) == todo


@FEW
@given(requests(), st.sampled_from(Strategy))
def test_the_clock_never_goes_backwards(asked: list[TraceRequest], strategy: Strategy) -> None:
    result = run(asked, strategy)
    ends = [step.ended_s for step in result.steps]
    assert ends == sorted(ends)
    last: dict[object, float] = {}
    for step in result.steps:
        lane = (step.replica, step.lane)
        assert step.started_s >= last.get(lane, 0.0), "two steps of a lane at a time"
        assert step.ended_s >= step.started_s + step.wall_s[0] > step.started_s
        last[lane] = step.ended_s
    for row in result.requests:
        assert row.queue_s is not None
        assert row.ttft_s is not None
        assert 0 <= row.queue_s < row.ttft_s <= row.response_s
        assert min(row.gaps_ms, default=1.0) > 0
        assert row.ttft_s + sum(row.gaps_ms) / 1e3 == pytest.approx(row.response_s)


@FEW
@given(requests(), st.sampled_from(Strategy), st.integers(22, 26), st.booleans())
def test_little_kv_ends_everything_all_the_same(
    asked: list[TraceRequest], strategy: Strategy, pages: int, prefix_cache: bool
) -> None:
    """Fewer pages than all need at a time: some wait, some are preempted and computed again.

    With a prefix cache its blocks are evicted for those that run.
    """
    one = {"replicas": 1, "tp": 8 if strategy is Strategy.SARATHI else 1}
    result = run(asked, strategy, kv_pages=pages, prefix_cache=prefix_cache, **one)
    rows = result.requests
    assert all(row.output_tokens == row.wanted_tokens for row in rows)
    assert max(max(step.kv_pages) for step in result.steps) <= pages
    todo = sum(row.prompt_tokens - row.cached_tokens + row.output_tokens - 1 for row in rows)
    assert sum(step.num_tokens for step in result.steps) >= todo


def test_preempted_requests_are_computed_again() -> None:
    asked = [request(0.0, 100, 150, 1000 * i, session=i) for i in range(8)]
    result = run(asked, Strategy.SARATHI, kv_pages=20, replicas=1, tp=8)
    assert all(row.output_tokens == 150 for row in result.requests)
    todo = sum(row.prompt_tokens + row.output_tokens - 1 for row in result.requests)
    assert sum(step.num_tokens for step in result.steps) > todo


@pytest.mark.parametrize("strategy", Strategy)
def test_the_same_seed_gives_the_same_bytes(strategy: Strategy, tmp_path: Path) -> None:
    asked = [request(0.01 * i, 40 + 30 * i, 5 + i, 1000 * (i % 3), session=i) for i in range(8)]
    for name in "ab":
        run(asked, strategy, layout=None, seed=3).write(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["requests.jsonl", "run.json", "steps.jsonl", "summary.json"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    text = (tmp_path / "a" / "run.json").read_text()
    assert '"kind": "simulated"' in text
    assert not {"date", "machine", "command"} & set(text.split('"'))


def test_a_second_turn_finds_its_prefix_on_its_replica() -> None:
    turns = [request(float(i), 160 + 64 * i, 4, 0, session=7) for i in range(3)]
    result = run(turns, Strategy.CSPS)
    assert [row.cached_tokens for row in result.requests] == [0, 160, 224]
    assert len({step.replica for step in result.steps}) == 1


def test_replicas_share_the_load() -> None:
    asked = [request(0.0, 200, 20, 1000 * i, session=i) for i in range(8)]
    result = run(asked, Strategy.SARATHI)
    prefilled = {index: 0 for index in range(4)}
    for step in result.steps:
        prefilled[step.replica] += step.num_tokens
    assert len(set(prefilled.values())) == 1, prefilled
    alone = run(asked, Strategy.SARATHI, replicas=1, tp=8)
    assert {step.replica for step in alone.steps} == {0}


def test_speed_is_a_factor_on_the_clock() -> None:
    asked = [request(float(i), 50, 2, 1000 * i) for i in range(3)]
    assert [row.sent_s for row in run(asked, Strategy.RING, speed=4.0).requests] == [0.0, 0.25, 0.5]


def test_decode_keeps_its_pace_beside_prefill() -> None:
    """Steps are as far apart as asked for while there is prefill, and prompts are done earlier."""
    asked = [request(0.0, 64, 400, 0), *(request(1.0, 2000, 2, 1000 * n) for n in range(1, 5))]
    free, paced = (
        simulate(trace(asked), load_cluster("cpu2"), MODEL, SimConfig(tbt_target_ms=target))
        for target in (0.0, 500.0)
    )
    starts, ends = {}, {}
    for name, result in (("free", free), ("paced", paced)):
        steps = sorted(result.steps, key=lambda step: step.started_s)
        prefill = [step for step in steps if step.lane is Lane.PREFILL][1:]
        first, ends[name] = prefill[0].started_s, prefill[-1].ended_s
        starts[name] = [
            step.started_s
            for step in steps
            if step.lane is Lane.DECODE and first < step.started_s < ends[name]
        ]
    assert min(b - a for a, b in pairwise(starts["paced"])) >= 0.5 - 1e-6
    assert len(starts["free"]) > 2 * len(starts["paced"]) > 4
    assert ends["paced"] < ends["free"]
    tokens = [sorted((r.request_id, r.output_tokens) for r in x.requests) for x in (free, paced)]
    assert tokens[0] == tokens[1]


def test_what_a_server_would_refuse_has_failed() -> None:
    asked = [request(0.0, 64, 2, 0), request(0.0, 3000, 2, 1000), request(0.1, 64, 2, 2000)]
    result = run(asked, Strategy.SARATHI, kv_pages=20)
    by_id = {row.request_id: row for row in result.requests}
    assert [by_id[str(i)].status for i in range(3)] == [Status.DONE, Status.FAILED, Status.DONE]
    assert "KV cache" in (by_id["1"].error or "")


def test_an_interrupted_run_keeps_what_there_is() -> None:
    asked = [request(0.2 * i, 100, 50, 1000 * i) for i in range(5)]

    def stop(done: int, total: int, now_s: float) -> None:
        del total, now_s
        if done == 2:
            raise KeyboardInterrupt

    result = simulate(trace(asked), CLUSTER, MODEL, settings(Strategy.CSPS, replicas=8), stop)
    assert result.run.interrupted
    assert [row.status for row in result.requests][:2] == [Status.DONE] * 2
    assert all(row.status is Status.UNFINISHED for row in result.requests[2:])


def test_a_model_that_does_not_fit() -> None:
    big = load_model("llama-3.1-70b")
    with pytest.raises(ConfigError, match=r"141\.1 GB.*a100x8 have 72\.0 GB"):
        simulate(trace([request(0, 10, 1, 0)]), CLUSTER, big, settings(Strategy.RING, replicas=8))


def test_a_truncated_trace_names_its_line_and_the_rest_can_be_played(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    asked = [request(0.1 * i, 40, 2, 1000 * i) for i in range(3)]
    write_trace(path, trace(asked))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ConfigError, match="line 4"):
        read_trace(path)
    kept, bad = read_trace(path, skip_bad=True)
    assert [row.line for row in bad] == [4]
    assert len(simulate(kept, CLUSTER, MODEL, settings(Strategy.CSPS)).requests) == 2
