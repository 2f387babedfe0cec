"""The fleet's side of a step and of a stream, with ranks that only say that they are there."""

import asyncio

import grpc
import pytest

from csps import __version__
from csps.core.config import ServerConfig, WorkerSetup
from csps.core.plan import Lane, StepPlan
from csps.rpc.fleet import Fleet
from csps.v1 import worker_pb2, worker_pb2_grpc

TIMEOUT_S = 20.0


def test_a_cancellation_beside_the_result_of_a_step_is_not_lost() -> None:
    """A server told to stop while a step ends must not plan another one: it would wait for ever."""

    async def scenario() -> None:
        fleet = Fleet(ServerConfig(WorkerSetup("tiny"), num_ranks=0))
        running = asyncio.create_task(fleet.run(StepPlan(Lane.DECODE, 0, ())))
        await asyncio.sleep(0)
        fleet._steps[Lane.DECODE, 0].over.set()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not fleet._steps

    asyncio.run(scenario())


def test_when_a_rank_is_lost_the_streams_of_the_others_end_at_once() -> None:
    """They wait for nothing the others would have to say: those wait for the end of the stream."""

    async def scenario() -> None:
        fleet = Fleet(ServerConfig(WorkerSetup("tiny"), num_ranks=2))
        server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(fleet, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            calls = [stub.Attach() for _ in range(2)]
            for rank, call in enumerate(calls):
                hello = worker_pb2.Hello(
                    rank=rank, world_size=2, version=__version__, host="here", pid=rank
                )
                await call.write(worker_pb2.WorkerReport(hello=hello))
                await call.write(worker_pb2.WorkerReport(ready=worker_pb2.Ready(num_blocks=8)))
                assert (await call.read()).HasField("setup")
            assert await fleet.wait_ready() == 8
            calls[1].cancel()
            assert await fleet.lost == "rank 1 (pid 1 on here) left"
            await fleet.shutdown(TIMEOUT_S)
            assert await calls[0].read() is grpc.aio.EOF, "no command to end well"
            assert await calls[0].code() is grpc.StatusCode.OK
        await server.stop(None)

    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))
