"""The fleet's side of a step, without ranks."""

import asyncio

import pytest

from csps.core.config import ServerConfig, WorkerSetup
from csps.core.plan import Lane, StepPlan
from csps.rpc.fleet import Fleet


def test_a_cancellation_beside_the_result_of_a_step_is_not_lost() -> None:
    """A server told to stop while a step ends must not plan another one: it would wait for ever."""

    async def scenario() -> None:
        fleet = Fleet(ServerConfig(WorkerSetup("tiny"), num_ranks=0))
        running = asyncio.create_task(fleet.run(StepPlan(Lane.DECODE, 0, ())))
        await asyncio.sleep(0)
        fleet._steps[Lane.DECODE].done.set_result(None)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not fleet._steps

    asyncio.run(scenario())
