"""Those that watch a server's steps: slow ones lose some, and all of them end."""

import asyncio
from pathlib import Path

import grpc
import pytest

from csps.coordinator.step_feed import StepFeed
from csps.coordinator.steps import FinishedStep
from csps.core.plan import Lane, Layout, StepPlan, StepResult, StepStats
from csps.sched.layout import Decision
from csps.v1 import admin_pb2, admin_pb2_grpc, generation_pb2_grpc
from tests.e2e.harness import prompt, request
from tests.e2e.in_process import TIMEOUT_S, only, serving

MAX_QUEUED = 8
# Of as many ranks: their records are far more than gRPC buffers for a reader that does not read.
NUM_STEPS, NUM_RANKS = 2000, 64


def finished(step_id: int) -> FinishedStep:
    stats = StepStats(0.01, 0.01, 0.005, 0.0, {"query": 1000}, {})
    return FinishedStep(
        StepPlan(Lane.DECODE, step_id, ()),
        [StepResult(rank, Lane.DECODE, step_id, stats=stats) for rank in range(NUM_RANKS)],
        Decision(Layout.SP, {}),
        started=1.0,
        ended=2.0,
        kv_pages=(0,) * NUM_RANKS,
        extents={},
    )


async def ask(target: str, output: int) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        message = request(prompt(20), max_tokens=output, ignore_eos=True)
        async for _ in stub.Generate(message, timeout=TIMEOUT_S):
            pass


async def gone(feed: StepFeed) -> bool:
    for _ in range(100):
        if not feed._watchers:
            return True
        await asyncio.sleep(0.05)
    return False


async def scenario(model: Path, store: Path) -> None:
    async with serving(model, store) as (_, target):
        feed = only(StepFeed)
        await ask(target, 1)
        await asyncio.sleep(0.2)
        num_tasks = len(asyncio.all_tasks())
        async with grpc.aio.insecure_channel(target) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)
            slow = stub.WatchSteps(admin_pb2.WatchStepsRequest(max_queued=MAX_QUEUED))
            waiting, deaf = (stub.WatchSteps(admin_pb2.WatchStepsRequest()) for _ in range(2))
            for call in (slow, waiting, deaf):
                assert await call.read() == admin_pb2.WatchStepsResponse()
            for step_id in range(NUM_STEPS):
                feed.on_step(finished(step_id))
            await ask(target, 3)
            seen = dropped = 0
            while seen + dropped < NUM_STEPS + 3:
                response = await asyncio.wait_for(slow.read(), TIMEOUT_S)
                seen += len(response.steps)
                dropped += response.num_dropped
            assert seen + dropped == NUM_STEPS + 3
            assert dropped > NUM_STEPS / 2
            slow.cancel()  # has read all
            deaf.cancel()  # while the server waits to send more
            waiting.cancel()
            assert await gone(feed)
        await asyncio.sleep(0.2)
        assert len(asyncio.all_tasks()) <= num_tasks, asyncio.all_tasks()
        channel = grpc.aio.insecure_channel(target)
        last = admin_pb2_grpc.AdminStub(channel).WatchSteps(admin_pb2.WatchStepsRequest())
        assert await last.read() == admin_pb2.WatchStepsResponse()
        await ask(target, 3)
    tokens = []
    while (response := await last.read()) is not grpc.aio.EOF:
        tokens += [step.num_tokens for step in response.steps]
    # The prompt's first block is known.
    assert tokens == [4, 1, 1], "a watcher gets all steps before the server ends its stream"
    await channel.close()


def test_watchers(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asyncio.run(scenario(tiny, tmp_path / "store"))
    bad = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert bad == []
