"""What every schedule shares: arrivals, ends, plans in flight, and who holds KV."""

from abc import ABC, abstractmethod
from bisect import insort
from collections import deque
from collections.abc import Mapping
from itertools import chain
from typing import ClassVar

from csps.core.errors import InvalidRequestError, OverloadedError
from csps.core.plan import Lane, SampledToken, StepPlan, Work
from csps.core.request import FinishReason
from csps.core.shards import num_blocks
from csps.sched.config import SchedulerConfig
from csps.sched.growth import has_room, needs_block
from csps.sched.integrity import check_in_flight, check_kv, check_lists
from csps.sched.ledger import Ledger
from csps.sched.placement import fits_kv
from csps.sched.prefix_cache import NO_PREFIX, Prefix
from csps.sched.sequence import Sequence, SequenceStatus, TokenEvent


class Scheduler(ABC):
    """Decides the steps of its lanes; at most two plans of a lane are in flight.

    The caller runs `plan(lane)` -> all ranks report -> `complete(plan, sampled)`. After any
    call it hands `released()` to the ranks before it sends another plan: pages of a
    released sequence may already be another's in that plan. Not thread safe.

    A lane that decodes may be planned one step ahead, so that ranks need not wait for what
    follows from a step before they begin the next. Tokens that the step under way draws stand
    in that plan as `Work.pending`; a sequence that turns out to have ended is computed once in
    vain, and keeps its pages until then.

    A schedule says in `lanes` which lanes it has, and in `_plan_work` what their steps do.
    """

    lanes: ClassVar[tuple[Lane, ...]]

    # Ownership: a live sequence is in exactly one of _waiting (no KV), _prefilling and
    # _running (both with KV); all three are sorted by arrival.

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.ledger = Ledger(
            config.num_ranks, config.pages_per_rank, config.block_size, config.prefix_cache
        )
        self.num_preemptions = 0
        self._sequences: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._waiting_tokens = 0
        self._prefilling: list[Sequence] = []
        self._running: list[Sequence] = []
        self._lists = {
            SequenceStatus.WAITING: self._waiting,
            SequenceStatus.PREFILLING: self._prefilling,
            SequenceStatus.RUNNING: self._running,
        }
        self._in_flight: dict[Lane, deque[StepPlan]] = {lane: deque() for lane in self.lanes}
        self._next_step = dict.fromkeys(self.lanes, 0)
        self._clock = 0  # virtual time: arrivals, and what a schedule adds
        self._released: list[int] = []

    @abstractmethod
    def _plan_work(self, lane: Lane) -> list[Work]:
        """The lane's next step, empty if nothing can run; none of the lane is in flight.

        Sequences with KV are moved by `_start` and `_preempt` alone.
        """

    @abstractmethod
    def _plan_ahead(self, lane: Lane) -> list[Work]:
        """The step behind the one that is in flight; empty if it must be waited for.

        Takes no sequence's KV.
        """

    @abstractmethod
    def has_work(self, lane: Lane) -> bool:
        """Whether the lane has sequences, in flight or waiting for KV included."""

    # Arrival and end

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence, whose id no live one has.

        Raises InvalidRequestError if it could never run, OverloadedError if the queue holds
        too many tokens to take it (an empty queue takes any prompt).
        """
        assert seq.seq_id not in self._sequences, f"sequence {seq.seq_id} is live"
        config, num_tokens = self.config, seq.num_tokens
        if num_tokens >= config.max_model_len:
            raise InvalidRequestError(
                "prompt",
                f"{num_tokens} tokens leave no room for output: the limit is "
                f"{config.max_model_len} tokens for both",
            )
        if not fits_kv(num_tokens + 1, config):
            raise InvalidRequestError(
                "prompt",
                f"needs KV for {num_tokens + 1} tokens, the KV cache holds {config.kv_tokens}",
            )
        queued = self.num_waiting_tokens
        if queued and queued + num_tokens > config.max_waiting_tokens:
            raise OverloadedError(
                f"{queued} tokens are queued, {num_tokens} more would exceed the limit of "
                f"{config.max_waiting_tokens}",
                config.retry_after_s,
            )
        # The last token drawn needs no KV.
        room = min(config.max_model_len, config.kv_tokens + 1) - num_tokens
        seq.max_new_tokens = min(seq.max_new_tokens or room, room)
        seq.arrival = self._clock
        self._clock += 1
        self._sequences[seq.seq_id] = seq
        self._list(seq, SequenceStatus.WAITING)

    def abort(self, seq_id: int) -> bool:
        """End a sequence without another token; False if no live one has this id.

        A step in flight that holds it is waited for: its pages return at that `complete`.
        """
        seq = self._sequences.get(seq_id)
        if seq is None or seq.closing:
            return False
        self._close(seq)
        return True

    def released(self) -> list[int]:
        """Drain the ids of sequences whose state the ranks must drop, in order.

        Each had been planned since it was last released; its last step is complete. A
        preempted one is planned again later, as if it were new.
        """
        released, self._released = self._released, []
        return released

    # Steps

    def plan(self, lane: Lane, *, ahead: bool = False) -> StepPlan | None:
        """The lane's next step; None while one is in flight or nothing can run.

        With `ahead` the step behind the one in flight, None while there are two.
        A sequence that waits for KV can run after any `complete` or `abort`. Planning
        decode may preempt even when it returns None.
        """
        assert lane in self.lanes, f"no {lane} lane in {self.lanes}"
        in_flight = self._in_flight[lane]
        if len(in_flight) > ahead:
            return None
        work = self._plan_ahead(lane) if in_flight else self._plan_work(lane)
        if not work:
            return None
        for item in work:
            seq = self._sequences[item.seq_id]
            seq.in_flight += 1
            seq.num_planned = item.stop
        plan = StepPlan(lane, self.take_step_id(lane), tuple(work))
        in_flight.append(plan)
        return plan

    def take_step_id(self, lane: Lane) -> int:
        """The id of the lane's next step, also for one that is planned elsewhere."""
        step_id = self._next_step[lane]
        self._next_step[lane] += 1
        return step_id

    def complete(self, plan: StepPlan, sampled: Mapping[int, SampledToken]) -> list[TokenEvent]:
        """Account for a step that all ranks have reported.

        `sampled` holds a token by seq_id for every Work with `sample`. Returns those tokens
        in plan order, without the aborted sequences'.
        """
        assert self._in_flight[plan.lane], f"no {plan.lane} step is in flight"
        in_flight = self._in_flight[plan.lane].popleft()
        assert in_flight.step_id == plan.step_id, f"step {in_flight.step_id} is in flight"
        events = []
        block_size = self.config.block_size
        for item in in_flight.work:
            seq = self._sequences[item.seq_id]
            seq.in_flight -= 1
            num_tokens = len(item.token_ids)
            seq.num_computed = stop = item.start + num_tokens
            if seq.closing:
                self._close(seq)
                continue
            if stop % block_size < num_tokens:  # a block is full that was not
                self.ledger.publish(seq.seq_id, seq.token_ids, stop, seq.salts[-1])
            if item.sample:
                token = sampled[item.seq_id]
                events.append(TokenEvent(seq, token, self._take_token(seq, token.token_id)))
        if self.ledger.num_sequences > 1:
            return events
        return [
            event if event.finish else event._replace(finish=self._end_if_stuck(event.seq))
            for event in events
        ]

    # State

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of sequences not started, or preempted, whether cached or not."""
        return self._waiting_tokens

    @property
    def num_prefilling(self) -> int:
        return len(self._prefilling)

    @property
    def num_running(self) -> int:
        """Sequences that decode."""
        return len(self._running)

    @property
    def kv_usage(self) -> float:
        """Pages in use / all pages."""
        return 1.0 - sum(self.ledger.free_by_rank()) / self.config.total_pages

    def check_integrity(self) -> None:
        """AssertionError if the ledger or the counters contradict each other."""
        check_lists(self._sequences, self._lists, self._waiting_tokens)
        check_in_flight(self._sequences.values(), chain(*self._in_flight.values()))
        check_kv(self._prefilling + self._running, self.ledger, self.config)

    # What schedules have in common

    def _follow(self) -> list[Sequence] | None:
        """Running sequences that go on behind the step in flight; None if KV has no room for it.

        Left out are those of which it is known that they end with it.
        """
        following = [
            seq
            for seq in self._running
            if not seq.closing
            and (not seq.in_flight or len(seq.output_ids) + 1 != seq.max_new_tokens)
        ]
        return following if has_room(following, self.config, self.ledger) else None

    # Moves between the lists

    @property
    def _free_slots(self) -> int:
        """Sequences that may start: so many more can hold KV."""
        return self.config.max_running - len(self._prefilling) - len(self._running)

    def _find_prefix(self, seq: Sequence) -> Prefix:
        """What the cache has now of a waiting sequence."""
        scores = seq.sampling.prompt_logprobs and not seq.output_ids
        # The row of every token that is scored must be computed.
        prefix = (
            NO_PREFIX if scores else self.ledger.match(seq.token_ids, seq.num_tokens, seq.salts)
        )
        seq.expected_cached = prefix.num_tokens
        seq.looked_at = self.ledger.num_published
        return prefix

    def _lacks_kv(self, seq: Sequence) -> bool:
        """Whether a waiting sequence surely finds too few pages. Costs less than to look.

        Since it last looked its prefix has grown by what was published at most.
        """
        size = self.config.block_size
        published = self.ledger.num_published - seq.looked_at
        least = num_blocks(seq.num_tokens, size) - seq.expected_cached // size - published
        return least > sum(self.ledger.free_by_rank())

    def _start(self, seq: Sequence, prefix: Prefix) -> None:
        """A waiting sequence, whose blocks have just been placed, begins its prefill."""
        self._move(seq, SequenceStatus.PREFILLING)
        seq.num_computed = seq.num_planned = seq.expected_cached = prefix.num_tokens
        if seq.num_cached is None:
            seq.num_cached = prefix.num_tokens

    def _preempt(self, seq: Sequence) -> None:
        """Queue a sequence that lost its KV."""
        assert not seq.in_flight, f"sequence {seq.seq_id} is in flight"
        seq.num_computed = seq.num_planned = 0
        self._move(seq, SequenceStatus.WAITING)
        self._released.append(seq.seq_id)
        self.num_preemptions += 1

    def _take_token(self, seq: Sequence, token_id: int) -> FinishReason | None:
        finish = seq.append(token_id)
        if finish is not None:
            self._close(seq)
        elif seq.status is SequenceStatus.PREFILLING:
            self._move(seq, SequenceStatus.RUNNING)
        return finish

    def _end_if_stuck(self, seq: Sequence) -> FinishReason | None:
        """LENGTH for one that alone fills the decode ranks and needs more: nobody will yield.

        No other holds KV.
        """
        if seq.in_flight or not needs_block(seq, self.ledger):
            return None
        if any(self.ledger.free_pages(rank) for rank in self.config.ranks(Lane.DECODE)):
            return None
        self._close(seq)
        return FinishReason.LENGTH

    def _close(self, seq: Sequence) -> None:
        """End it, when no step has it any more: until then its pages are written to."""
        seq.closing = True
        if not seq.in_flight:
            self._end(seq)

    def _end(self, seq: Sequence) -> None:
        self._unlist(seq)
        if seq.status is not SequenceStatus.WAITING:
            self.ledger.free(seq.seq_id)
            self._released.append(seq.seq_id)
        del self._sequences[seq.seq_id]
        seq.status = SequenceStatus.FINISHED

    def _move(self, seq: Sequence, status: SequenceStatus) -> None:
        self._unlist(seq)
        self._list(seq, status)

    def _unlist(self, seq: Sequence) -> None:
        if seq.status is SequenceStatus.WAITING:
            self._waiting_tokens -= seq.num_tokens
        self._lists[seq.status].remove(seq)

    def _list(self, seq: Sequence, status: SequenceStatus) -> None:
        seq.status = status
        insort(self._lists[status], seq, key=by_arrival)
        if status is SequenceStatus.WAITING:
            self._waiting_tokens += seq.num_tokens


def by_arrival(seq: Sequence) -> int:
    return seq.arrival
