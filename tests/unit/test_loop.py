"""When the engine loop sends steps, with ranks that end them when told to."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from csps.coordinator.live import LiveRequest
from csps.coordinator.loop import EngineLoop
from csps.core.plan import Lane, Layout, StepPlan, StepResult, StepStats
from csps.core.request import SamplingParams
from csps.rpc.fleet import StepUnderWay
from csps.sched.disagg import DisaggScheduler
from csps.sched.layout import FixedLayout
from csps.sched.sequence import Sequence
from tests.unit.scheduling import CONFIG
from tests.unit.simulated_ranks import SimulatedRanks, prompt_of

TIMEOUT_S = 20.0


class Ranks:
    """In place of a fleet: `sent` has the steps of decode that are under way, in order.

    Prefill ends at once, decode when `end` is called and lasts as long as `wall_s` claims.
    """

    def __init__(self) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.wall_s = 0.0
        self.sent: list[StepPlan] = []
        self.changed = asyncio.Event()
        self._ranks = SimulatedRanks(CONFIG)
        self._under_way: dict[int, StepUnderWay] = {}

    def begin(self, plan: StepPlan) -> StepUnderWay:
        self._ranks.start(plan)
        step = StepUnderWay(plan)
        if plan.lane is Lane.PREFILL:
            step.over.set()
        else:
            self.sent.append(plan)
            self._under_way[plan.step_id] = step
            self.changed.set()
        return step

    async def results_of(self, step: StepUnderWay) -> list[StepResult]:
        await step.over.wait()
        plan = step.plan
        sampled = tuple(self._ranks.finish(plan).values())
        stats = StepStats(wall_s=self.wall_s if plan.lane is Lane.DECODE else 0.0)
        return [StepResult(0, plan.lane, plan.step_id, sampled, stats)]

    def release(self, seq_ids: list[int]) -> None:
        self._ranks.release(seq_ids)

    def end(self) -> None:
        """The oldest step under way."""
        self._under_way.pop(self.sent.pop(0).step_id).over.set()

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.changed.clear()
            await self.changed.wait()


def request(seq_id: int, max_tokens: int) -> LiveRequest:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    seq = Sequence(seq_id, prompt_of(seq_id, 5), sampling)
    return LiveRequest(f"request {seq_id}", seq, received=0.0)


@asynccontextmanager
async def running(async_scheduling: bool) -> AsyncIterator[tuple[EngineLoop, Ranks]]:
    ranks = Ranks()
    policies = {lane: FixedLayout(Layout.SP) for lane in DisaggScheduler.lanes}
    scheduler = DisaggScheduler(CONFIG)
    loop = EngineLoop(scheduler, ranks, policies, async_scheduling=async_scheduling)  # type: ignore[arg-type]
    task = asyncio.create_task(loop.run())
    try:
        yield loop, ranks
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))


def test_the_step_behind_is_sent_before_the_one_under_way_is_over() -> None:
    async def scenario() -> None:
        async with running(async_scheduling=True) as (loop, ranks):
            loop.submit(request(0, 4))
            for first in range(2):
                await ranks.until(lambda: len(ranks.sent) == 2)
                assert [plan.step_id for plan in ranks.sent] == [first, first + 1]
                assert ranks.sent[1].work[0].pending
                ranks.end()
            # The last token is drawn by the step that is left.
            await asyncio.sleep(0.05)
            assert [plan.step_id for plan in ranks.sent] == [2]

    run(scenario)


def test_in_turn_no_step_is_sent_before_the_one_under_way_is_over() -> None:
    async def scenario() -> None:
        async with running(async_scheduling=False) as (loop, ranks):
            loop.submit(request(0, 4))
            for step_id in range(3):
                await ranks.until(lambda: bool(ranks.sent))
                await asyncio.sleep(0.05)
                (plan,) = ranks.sent
                assert plan.step_id == step_id
                assert not plan.work[0].pending
                ranks.end()

    run(scenario)


def test_what_comes_while_a_step_is_under_way_is_in_the_one_behind() -> None:
    """Which is planned when it is nearly over, as the lane's last one tells."""

    async def scenario() -> None:
        async with running(async_scheduling=True) as (loop, ranks):
            loop.submit(request(0, 20))
            await ranks.until(lambda: len(ranks.sent) == 2)
            ranks.wall_s = 1.0
            ranks.end()
            await asyncio.sleep(0.05)
            (under_way,) = ranks.sent
            loop.submit(request(1, 20))
            await ranks.until(lambda: len(ranks.sent) == 2)
            assert [work.seq_id for work in under_way.work] == [0]
            works = {work.seq_id: work for work in ranks.sent[1].work}
            assert works.keys() == {0, 1}
            assert works[0].pending
            assert not works[1].pending

    run(scenario)


def test_a_step_that_ends_sooner_than_expected_is_followed_at_once() -> None:
    async def scenario() -> None:
        async with running(async_scheduling=True) as (loop, ranks):
            loop.submit(request(0, 20))
            await ranks.until(lambda: len(ranks.sent) == 2)
            ranks.wall_s = 2 * TIMEOUT_S
            ranks.end()
            await asyncio.sleep(0.05)
            (under_way,) = ranks.sent
            ranks.end()
            await ranks.until(lambda: bool(ranks.sent))
            assert ranks.sent[0].step_id == under_way.step_id + 1
            assert not ranks.sent[0].work[0].pending

    run(scenario)


def test_tokens_are_the_same_and_all_pages_come_back() -> None:
    async def scenario() -> None:
        outputs = []
        for async_scheduling in (True, False):
            async with running(async_scheduling) as (loop, ranks):
                requests = [request(seq_id, 3 + 5 * seq_id) for seq_id in range(4)]
                for one in requests:
                    loop.submit(one)
                while loop.scheduler.kv_usage or loop.scheduler.num_waiting:
                    await ranks.until(lambda: bool(ranks.sent) or not loop.scheduler.num_running)
                    if ranks.sent:
                        ranks.end()
                    await asyncio.sleep(0)
                loop.scheduler.check_integrity()
                outputs.append([one.seq.output_ids for one in requests])
        assert outputs[0] == outputs[1]
        assert [len(output) for output in outputs[0]] == [3, 8, 13, 18]

    run(scenario)
