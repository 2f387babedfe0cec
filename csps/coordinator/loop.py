"""The engine loop: asks the scheduler for steps, has the fleet run them, hands out tokens.

One task per lane, so the lanes never wait for each other; the scheduler and everything here
is touched by the event loop's thread alone.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from csps.coordinator.counters import LaneCounters
from csps.coordinator.live import Ended, LiveRequest, Prefilled, PrefillStep
from csps.coordinator.observer import Observer
from csps.coordinator.sparse import SparseSummary
from csps.coordinator.steps import FinishedStep
from csps.core.errors import CspsError, DuplicateRequestError, UnavailableError
from csps.core.plan import Lane, StepPlan, StepResult
from csps.core.request import FinishReason
from csps.core.shards import Extent
from csps.rpc.fleet import Fleet, StepUnderWay
from csps.sched.cost import shape_of
from csps.sched.layout import Decision, LayoutPolicy
from csps.sched.pacing import DecodePace
from csps.sched.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Before a step's end the next one is planned so early: planning and sending take less.
AHEAD_S = 0.01


class _Step(NamedTuple):
    """A step that was sent. `begun`: of time.time, when it was sent or the one before was over.

    `ahead`: it was sent before that.
    """

    plan: StepPlan
    decision: Decision
    begun: float
    ahead: bool
    sent: StepUnderWay


class EngineLoop:
    """Owns the scheduler and the live requests."""

    def __init__(
        self,
        scheduler: Scheduler,
        fleet: Fleet,
        layouts: Mapping[Lane, LayoutPolicy],
        observers: Sequence[Observer] = (),
        pace: DecodePace | None = None,
        *,
        async_scheduling: bool = True,
    ) -> None:
        """`async_scheduling`: send the step behind the one under way before that has ended."""
        self.scheduler = scheduler
        self._layouts = layouts
        self._pace = pace or DecodePace()
        self._ahead = async_scheduling
        self._last_s = dict.fromkeys(scheduler.lanes, 0.0)  # the ranks' time for the last step
        self._observers = observers
        self.counters = {lane: LaneCounters() for lane in scheduler.lanes}
        self.sparse = SparseSummary()  # of all requests, with `num_sparse` of them
        self.num_sparse = 0
        self._fleet = fleet
        self._by_id: dict[str, LiveRequest] = {}
        self._by_seq: dict[int, LiveRequest] = {}
        self._wake = {lane: asyncio.Event() for lane in scheduler.lanes}
        self._failure: CspsError | None = None

    @property
    def num_live(self) -> int:
        """Requests whose stream has not been closed yet."""
        return len(self._by_id)

    def submit(self, live: LiveRequest) -> None:
        """Queue a request. Raises what the scheduler's admission or a failed fleet says."""
        if self._failure is not None:
            raise self._failure
        if live.request_id in self._by_id:
            raise DuplicateRequestError(f"request_id: {live.request_id!r} is live already")
        self.scheduler.add(live.seq)
        self._by_id[live.request_id] = live
        self._by_seq[live.seq.seq_id] = live
        self._wake_all()

    def close(self, live: LiveRequest) -> None:
        """The request's stream is over, for whatever reason: stop its work, forget it.

        May be called again, even when another request has the id by then.
        """
        if self._by_id.get(live.request_id) is live:
            del self._by_id[live.request_id]
            live.ended = time.monotonic()
            for observer in self._observers:
                observer.on_end(live)
        self._stop_work(live)

    def refused(self, error: CspsError) -> None:
        """A request was not taken: it never became live."""
        for observer in self._observers:
            observer.on_refused(error)

    def abort(self, request_id: str) -> bool:
        """End a live request's stream with reason ABORT; False if there is none of that id."""
        live = self._by_id.get(request_id)
        if live is None:
            return False
        # Now, not when its stream closes: a client that has stopped reading never gets there.
        self._stop_work(live)
        live.events.put_nowait(Ended(FinishReason.ABORT))
        return True

    def _stop_work(self, live: LiveRequest) -> None:
        if self._by_seq.pop(live.seq.seq_id, None) is not None:
            self.scheduler.abort(live.seq.seq_id)
            self._release()
            self._wake_all()

    def is_live(self, request_id: str) -> bool:
        return request_id in self._by_id

    async def run(self) -> None:
        """Run the lanes until cancelled, or until a rank is lost (UnavailableError)."""
        lanes = [
            asyncio.create_task(self._run_lane(lane), name=lane) for lane in self.scheduler.lanes
        ]
        lost = asyncio.ensure_future(asyncio.shield(self._fleet.lost))
        ends: set[asyncio.Future[Any]] = {*lanes, lost}
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if lost in done:
                raise UnavailableError(lost.result())
            for task in done:
                task.result()
        except Exception as error:
            logger.error("engine stopped: %s", error)
            self.fail(error if isinstance(error, CspsError) else UnavailableError(repr(error)))
            raise
        finally:
            lost.cancel()
            for task in lanes:
                task.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)

    async def _run_lane(self, lane: Lane) -> None:
        step: _Step | None = None
        while True:
            if step is None:
                step = await self._begin_next(lane)
            behind = await self._begin_behind(step) if self._ahead else None
            results = await self._fleet.results_of(step.sent)
            self._finish(step, results)
            self._wake_all()
            step = behind._replace(begun=time.time()) if behind is not None else None

    async def _begin_next(self, lane: Lane) -> _Step:
        """The lane's next step, none being under way, when there is one."""
        while True:
            if lane is Lane.DECODE:
                await self._keep_pace()
            step = self._begin(lane)
            if step is not None:
                return step
            self._check_when_idle()
            await self._wake[lane].wait()
            self._wake[lane].clear()

    async def _begin_behind(self, step: _Step) -> _Step | None:
        """The one behind a step under way, when that is nearly over; None if it must be waited for.

        As late as possible: what comes after this is not in it. A step is taken to last as long as
        its lane's last one.
        """
        lane = step.plan.lane
        left_s = step.begun + self._last_s[lane] - AHEAD_S - time.time()
        if left_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await step.sent.over.wait()
        if step.sent.over.is_set() or (lane is Lane.DECODE and self._next_s() > time.monotonic()):
            return None
        return self._begin(lane, ahead=True)

    def _begin(self, lane: Lane, *, ahead: bool = False) -> _Step | None:
        """Plan a step and send it; None if there is none. `ahead`: behind one under way."""
        plan = self.scheduler.plan(lane, ahead=ahead)
        self._release()
        if plan is None:
            return None
        if lane is Lane.DECODE:
            self._pace.note_start(time.monotonic())
        self._note_scheduled(plan)
        decision = self._layouts[lane].decide(shape_of(plan))
        plan = replace(plan, layout=decision.layout)
        return _Step(plan, decision, time.time(), ahead, self._fleet.begin(plan))

    def _next_s(self) -> float:
        """When decode may take its next step."""
        return self._pace.next_s(self.scheduler.num_prefilling)

    async def _keep_pace(self) -> None:
        """Until the next decode step may begin: it is its time, or prefill is over."""
        wake = self._wake[Lane.DECODE]
        while (next_s := self._next_s()) > time.monotonic():
            wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(next_s - time.monotonic()):
                    await wake.wait()

    def _finish(self, under_way: _Step, results: Sequence[StepResult]) -> None:
        plan, decision = under_way.plan, under_way.decision
        wall_s = max(result.stats.wall_s for result in results)
        self._layouts[plan.lane].observe(decision, wall_s)
        self._last_s[plan.lane] = wall_s
        ended = time.time()
        started = ended - wall_s if under_way.ahead else under_way.begun
        extents = self._extents(plan)  # now: a sequence that ends gives its blocks back
        sampled = {token.seq_id: token for result in results for token in result.sampled}
        events = self.scheduler.complete(plan, sampled)
        self._release()
        self.counters[plan.lane].add(plan, results, decision)
        step = FinishedStep(plan, results, decision, started, ended, self._used_pages(), extents)
        for observer in self._observers:
            observer.on_step(step)
        self._note_prefilled(step)
        self._note_sparse(plan, results)
        self._note_scored(results)
        for seq, token, finish in events:
            live = self._by_seq.get(seq.seq_id)
            if live is not None:
                gap_s = live.put_token(token, finish)
                for observer in self._observers:
                    observer.on_token(live, gap_s)
                if finish is not None:
                    del self._by_seq[seq.seq_id]

    def _extents(self, plan: StepPlan) -> Mapping[int, tuple[Extent, ...]]:
        """Blocks of the step's sequences, if bytes may differ from those of exact attention."""
        if not any(work.attention.is_sparse for work in plan.work):
            return {}
        ledger = self.scheduler.ledger
        return {work.seq_id: ledger.extents(work.seq_id) for work in plan.work}

    def _used_pages(self) -> tuple[int, ...]:
        ledger = self.scheduler.ledger
        return tuple(ledger.used_pages(rank) for rank in range(ledger.num_ranks))

    def _note_scheduled(self, plan: StepPlan) -> None:
        now = time.monotonic()
        for work in plan.work:
            live = self._by_seq.get(work.seq_id)
            if live is not None and not live.first_scheduled:
                live.first_scheduled = now

    def _note_prefilled(self, step: FinishedStep) -> None:
        lane, step_id, layout = step.plan.lane, step.plan.step_id, step.plan.layout
        if lane is Lane.DECODE:
            return
        for work in step.plan.work:
            live = self._by_seq.get(work.seq_id)
            if live is not None and not live.first_token:
                live.events.put_nowait(Prefilled(work.stop))
                live.prefill_steps.append(
                    PrefillStep(lane, step_id, layout, work.num_tokens, step.started, step.ended)
                )

    def _note_sparse(self, plan: StepPlan, results: Sequence[StepResult]) -> None:
        for work in plan.work:
            if not work.attention.is_sparse:
                continue
            reports = [
                report
                for result in results
                for report in result.sparse
                if report.seq_id == work.seq_id
            ]
            step = SparseSummary()
            step.add(reports, work.attention.gamma)
            self.sparse.merge(step)
            self.num_sparse += work.sample  # the step that ends a prompt
            live = self._by_seq.get(work.seq_id)
            if live is not None:
                live.sparse.add(reports, work.attention.gamma)

    def _note_scored(self, results: Sequence[StepResult]) -> None:
        for result in results:
            for scored in result.scored:
                live = self._by_seq.get(scored.seq_id)
                if live is not None:
                    live.put_scores(scored)

    def _release(self) -> None:
        released = self.scheduler.released()
        if released:
            self._fleet.release(released)

    def _wake_all(self) -> None:
        for wake in self._wake.values():
            wake.set()

    def _check_when_idle(self) -> None:
        if not any(self.scheduler.has_work(lane) for lane in self.scheduler.lanes):
            self.scheduler.check_integrity()

    def fail(self, error: CspsError) -> None:
        """End every stream with `error`, and refuse what comes with it. The first one counts."""
        if self._failure is not None:
            return
        self._failure = error
        for live in self._by_seq.values():
            live.events.put_nowait(Ended(FinishReason.ABORT, error))
        self._by_seq.clear()
