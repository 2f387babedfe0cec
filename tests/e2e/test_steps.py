"""Step records of a live server: complete, equal to its counters, never in its way."""

import asyncio
from collections import Counter

import pytest

from csps.core.plan import Lane
from csps.core.request import SamplingParams
from csps.records.rows import StepRow, read_steps
from csps.rpc.client import AttentionChoice, AttentionKind, GenerationClient, ServerError
from csps.v1 import generation_pb2 as pb
from tests.e2e.harness import prompt
from tests.e2e.observed import Observed

BLOCK = 16


async def ask(client: GenerationClient, ids: list[int], output: int, **attention: object) -> None:
    sampling = SamplingParams(max_tokens=output, ignore_eos=True)
    async for _ in client.generate(ids, sampling, attention=AttentionChoice(**attention)):
        pass


async def steps_of(
    client: GenerationClient, *requests: tuple[list[int], int, AttentionKind]
) -> list[StepRow]:
    """What a watcher sees while requests run one by one."""
    before = await num_steps(client)
    watch = client.watch_steps()
    first = await anext(watch)
    assert (first.rows, first.dropped) == ((), 0)
    for ids, output, kind in requests:
        await ask(client, ids, output, kind=kind)
    wanted = await num_steps(client) - before
    rows: list[StepRow] = []
    async with asyncio.timeout(10):
        while len(rows) < wanted:
            rows += (await anext(watch)).rows
    await watch.aclose()
    assert len(rows) == wanted
    return rows


async def num_steps(client: GenerationClient) -> int:
    return sum(lane.steps for lane in (await client.server_info()).lanes)


def totals(lane: pb.LaneCounters) -> dict[str, float]:
    return {
        "steps": lane.steps,
        "tokens": lane.tokens,
        "wall_s": lane.wall_s,
        "compute_s": lane.compute_s,
        "comm_s": lane.comm_s,
        "exposed_comm_s": lane.exposed_comm_s,
        **lane.bytes_sent,
    }


def summed(rows: list[StepRow], lane: str) -> dict[str, float]:
    total: Counter[str] = Counter()
    for row in rows:
        if row.lane.value == lane:
            total.update(row.bytes_sent)
            total.update({"steps": 1, "tokens": row.num_tokens, "wall_s": max(row.wall_s)})
            for name in ("compute_s", "comm_s", "exposed_comm_s"):
                total[name] += sum(getattr(row, name))
    return dict(total)


def test_every_step_arrives_and_is_logged(observed: Observed) -> None:
    async def scenario() -> list[StepRow]:
        async with GenerationClient(observed.server.target) as client:
            return await steps_of(
                client,
                (prompt(1100, seed=1), 20, AttentionKind.CSA),
                (prompt(60, seed=2), 5, AttentionKind.DENSE),
            )

    before, logged_before = observed.server.info(), len(read_steps(observed.folder))
    rows = asyncio.run(scenario())
    after = observed.server.info()
    for old, new in zip(before.lanes, after.lanes, strict=True):
        start = totals(old)
        moved = {key: value - start.get(key, 0) for key, value in totals(new).items()}
        assert summed(rows, new.lane) == pytest.approx(moved)
    # The log keeps microseconds.
    for row, logged in zip(rows, read_steps(observed.folder)[logged_before:], strict=True):
        assert (logged.lane, logged.step_id) == (row.lane, row.step_id)
        assert logged.ended_s == pytest.approx(row.ended_s, abs=1e-6)
        assert logged.wall_s == pytest.approx(row.wall_s, abs=1e-6)
        assert (logged.bytes_sent, logged.dense_bytes) == (row.bytes_sent, row.dense_bytes)
        assert logged.kv_pages == row.kv_pages
    ids = [row.step_id for row in rows if row.lane is Lane.DECODE]
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    sparse = [row for row in rows if row.density is not None]
    assert [row.lane for row in sparse] == [Lane.PREFILL] * 3
    for row in sparse:
        assert 0 < row.density <= 1
        assert 0.9 <= row.recall <= 1
        assert sum(row.kv_pages) == -(-1100 // BLOCK)
    assert rows[-1].kv_pages == (0, 0)


def test_dense_bytes_are_what_exact_attention_sends(observed: Observed) -> None:
    """By KV round the ring and, where few queries are left, by queries shipped to it."""
    ids = prompt(1100, seed=3)

    async def scenario() -> tuple[list[StepRow], list[StepRow]]:
        async with GenerationClient(observed.server.target) as client:
            sparse = await steps_of(client, (ids, 1, AttentionKind.CSA))
            return sparse, await steps_of(client, (ids, 1, AttentionKind.DENSE))

    sparse, dense = asyncio.run(scenario())
    assert all(row.density is not None for row in sparse)
    sent = [sum(row.bytes_sent.values()) for row in dense]
    assert [row.dense_bytes for row in sparse] == sent
    assert [row.dense_bytes for row in dense] == sent
    assert [set(row.bytes_sent) for row in dense] == [{"kv"}, {"kv"}, {"query", "partial"}]


def test_too_long_a_queue_is_refused(observed: Observed) -> None:
    async def scenario() -> None:
        async with GenerationClient(observed.server.target) as client:
            await anext(client.watch_steps(max_queued=65_537))

    with pytest.raises(ServerError, match=r"INVALID_ARGUMENT: max_queued: .*65536, got 65537"):
        asyncio.run(scenario())
