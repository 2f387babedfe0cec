"""Nothing is remembered of streams that were cancelled at any moment."""

import asyncio
import contextlib
import gc
import random
from pathlib import Path

import grpc
import pytest

from csps.coordinator.loop import EngineLoop
from csps.engine.runner import Runner
from csps.v1 import generation_pb2 as pb
from csps.v1 import generation_pb2_grpc
from tests.e2e.harness import prompt, request
from tests.e2e.in_process import TIMEOUT_S, only, serving

NUM_STREAMS = 200


async def one_stream(stub: generation_pb2_grpc.GenerationStub, number: int) -> None:
    """Cancelled at a random moment, mostly early: while it is sent, queued or prefilled."""
    source = random.Random(number)
    message = request(
        prompt(source.choice([3, 100, 600]), seed=number), max_tokens=30, ignore_eos=True
    )
    call = stub.Generate(message, timeout=TIMEOUT_S)
    if number % 10:
        mean_s = source.choice([0.001, 0.05])
        asyncio.get_running_loop().call_later(source.expovariate(1 / mean_s), call.cancel)
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        async for _ in call:
            await asyncio.sleep(source.choice([0.0, 0.0, 0.02]))


def check_no_stream_is_remembered(num_tasks: int) -> None:
    loop, runner = only(EngineLoop), only(Runner)
    assert loop.num_live == 0
    assert loop._by_seq == {}
    assert runner._states == {}, "the rank remembers sequences that have ended"
    loop.scheduler.check_integrity()
    assert loop.scheduler.kv_usage == 0.0
    tasks = asyncio.all_tasks()
    assert len(tasks) <= num_tasks, tasks


async def churn(model: Path, store: Path) -> None:
    async with (
        serving(model, store) as (_, target),
        grpc.aio.insecure_channel(target) as channel,
    ):
        stub = generation_pb2_grpc.GenerationStub(channel)
        await one_stream(stub, 0)
        await asyncio.sleep(0.2)
        num_tasks = len(asyncio.all_tasks())
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
            for number in range(NUM_STREAMS):
                group.create_task(one_stream(stub, number))
        # Polled: the server is asked, as a load balancer would.
        while (await stub.GetLoad(pb.GetLoadRequest())).num_running:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        check_no_stream_is_remembered(num_tasks)


def test_cancelled_streams_leave_no_task_and_no_state(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(churn(tiny, tmp_path / "store"))
    gc.collect()
    bad = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert bad == []
