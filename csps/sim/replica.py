"""One simulated server: the real scheduler on a virtual clock, its steps timed by a cost model.

It does what csps.coordinator.loop does: each lane plans a step, decides its layout, waits for it
to end, accounts for it and plans the next one.
"""

from collections.abc import Callable, Mapping

from csps.core.plan import Lane, SampledToken
from csps.records.rows import StepRow
from csps.sched.cost import shape_of
from csps.sched.layout import LayoutPolicy
from csps.sched.pacing import DecodePace
from csps.sched.scheduler import Scheduler
from csps.sim.clock import Clock
from csps.sim.request import SimRequest
from csps.sim.sharing import RunningStep, SharedDevice, Sharing
from csps.sim.step_cost import StepCosts

# Above every prompt's token, so that no prompt begins with another's output.
OUTPUT_TOKEN = 2**32 - 1


_TOKEN = SampledToken(seq_id=-1, token_id=OUTPUT_TOKEN)


class Replica:
    """A server of its own: requests in, tokens and rows out."""

    def __init__(
        self,
        index: int,
        clock: Clock,
        scheduler: Scheduler,
        policies: Mapping[Lane, LayoutPolicy],
        costs: StepCosts,
        sharing: Sharing,
        step_s: Mapping[Lane, float],
        note_step: Callable[[StepRow], None] | None,
        note_end: Callable[[SimRequest], None],
        pace: DecodePace,
        side_by_side: bool = True,
    ) -> None:
        """`step_s`: before a step's work. `side_by_side` False: lanes take turns.

        `note_step` gets a row for each step, `note_end` each request that is done.
        """
        self.scheduler = scheduler
        self.queued_tokens = 0  # of requests without a first token
        self._index = index
        self._clock = clock
        self._policies = policies
        self._costs = costs
        self._step_s = step_s
        self._note_step = note_step
        self._note_end = note_end
        self._pace = pace
        self._waits_until = -1.0  # a decode step for its pace
        self._side_by_side = side_by_side
        self._device = SharedDevice(clock, sharing, self._complete)
        self._requests: dict[int, SimRequest] = {}
        self._sampled: dict[int, SampledToken] = {}  # of every live request: all draw the same

    @property
    def num_live(self) -> int:
        return len(self._requests)

    def submit(self, request: SimRequest) -> None:
        """Queue a request. Raises what the scheduler's admission does."""
        self.scheduler.add(request.sequence)
        self._requests[request.index] = request
        self._sampled[request.index] = _TOKEN
        self.queued_tokens += request.trace.prompt_tokens
        self._wake(self.scheduler.lanes)

    def _wake(self, lanes: tuple[Lane, ...]) -> None:
        running = self._device.running
        for lane in lanes:
            is_free = lane not in running and (self._side_by_side or not running)
            if is_free and self.scheduler.has_work(lane):
                if lane is Lane.DECODE and self._waits():
                    continue
                self._start(lane)

    def _waits(self) -> bool:
        """Whether the next decode step has to wait for its pace; it is woken then."""
        next_s = self._pace.next_s(self.scheduler.num_prefilling)
        if next_s <= self._clock.now:
            return False
        if next_s > self._waits_until:
            self._waits_until = next_s
            self._clock.at(next_s, self._wake, (Lane.DECODE,))
        return True

    def _start(self, lane: Lane) -> None:
        plan = self.scheduler.plan(lane)
        self._release()
        if plan is None:
            return
        now = self._clock.now
        if lane is Lane.DECODE:
            self._pace.note_start(now)
        for work in plan.work:
            if work.sampling is not None:  # its first step, or again after a preemption
                self._requests[work.seq_id].note_scheduled(now)
        shape = shape_of(plan)
        decision = self._policies[lane].decide(shape)
        cost = self._costs.cost(plan, decision.layout, shape)
        wait_s = self._step_s[lane]
        self._device.start(RunningStep(plan, decision, shape, cost, now, wait_s, cost.wall_s))

    def _complete(self, step: RunningStep) -> None:
        now, plan = self._clock.now, step.plan
        for seq, _, finish in self.scheduler.complete(plan, self._sampled):
            request = self._requests[seq.seq_id]
            if not request.num_output:
                self.queued_tokens -= request.trace.prompt_tokens
            request.note_token(now)
            if finish is not None:
                del self._requests[seq.seq_id], self._sampled[seq.seq_id]
                self._note_end(request)
        self._release()
        wall_s = now - step.started_s - self._step_s[plan.lane]
        self._policies[plan.lane].observe(step.decision, wall_s)
        if self._note_step is not None:
            self._note_step(self._row(step, wall_s))
        others = tuple(lane for lane in self.scheduler.lanes if lane is not plan.lane)
        # Where lanes take turns, it is the others'.
        self._wake((plan.lane, *others) if self._side_by_side else (*others, plan.lane))

    def _release(self) -> None:
        released = self.scheduler.released()
        if released:
            self._costs.released(released)

    def _row(self, step: RunningStep, wall_s: float) -> StepRow:
        """Times by rank are one number: the slowest rank's, for which the others wait."""
        plan, cost, shape = step.plan, step.cost, step.shape
        stretch = wall_s / cost.wall_s if cost.wall_s else 1.0
        return StepRow(
            lane=plan.lane,
            step_id=plan.step_id,
            started_s=step.started_s,
            ended_s=self._clock.now,
            layout=step.decision.layout,
            num_tokens=shape.num_tokens,
            num_sequences=shape.num_sequences,
            num_pairs=shape.num_pairs,
            num_keys=shape.num_keys,
            wall_s=(wall_s,),
            compute_s=(cost.compute_s * stretch,),
            comm_s=(cost.comm_s * stretch,),
            exposed_comm_s=(cost.exposed_comm_s * stretch,),
            bytes_sent=cost.bytes_sent,
            dense_bytes=cost.dense_bytes,
            predicted_s=step.decision.predicted_s,
            density=cost.density,
            recall=cost.recall,
            kv_pages=self.scheduler.ledger.used_by_rank(),
            replica=self._index,
        )
