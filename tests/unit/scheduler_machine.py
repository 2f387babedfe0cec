"""Random arrivals and aborts for any scheduler, against simulated ranks."""

from collections import deque

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from csps.core.attention import DENSE, AttentionKind, AttentionParams
from csps.core.errors import InvalidRequestError, OverloadedError
from csps.core.plan import Lane, StepPlan
from csps.core.request import FinishReason, SamplingParams
from csps.sched.scheduler import Scheduler
from csps.sched.sequence import Sequence, SequenceStatus
from tests.unit.simulated_ranks import SimulatedRanks, prompt_of, token_at

STOP_TOKEN = 13


ATTENTIONS = (
    DENSE,
    AttentionParams(AttentionKind.CSA, gamma=0.9),
    AttentionParams(AttentionKind.CSA, gamma=0.95),
    AttentionParams(AttentionKind.CSA_DISTANCE, window_blocks=4),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, steps and aborts; at the end everything accepted must end."""

    rounds_per_token = 4

    def draw_scheduler(self, data: st.DataObject) -> Scheduler:
        raise NotImplementedError

    def lane(self, pick: int) -> Lane:
        return self.scheduler.lanes[pick % len(self.scheduler.lanes)]

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        self.scheduler = self.draw_scheduler(data)
        self.config = self.scheduler.config
        self.ranks = SimulatedRanks(self.config)
        self.in_flight: dict[Lane, deque[StepPlan]] = {
            lane: deque() for lane in self.scheduler.lanes
        }
        self.live: dict[int, Sequence] = {}
        self.outputs: dict[int, list[int]] = {}
        self.next_id = 0
        self.ahead = data.draw(st.booleans())

    @rule(
        num_prompt=st.one_of(st.integers(1, 12), st.integers(1, 60)),
        max_tokens=st.one_of(st.none(), st.integers(1, 30)),
        min_tokens=st.integers(0, 10),
        ignore_eos=st.booleans(),
        attention=st.sampled_from(ATTENTIONS),
        scores=st.sampled_from([False, False, False, True]),
    )
    def arrive(
        self,
        num_prompt: int,
        max_tokens: int | None,
        min_tokens: int,
        ignore_eos: bool,
        attention: AttentionParams,
        scores: bool,
    ) -> None:
        seq_id, self.next_id = self.next_id, self.next_id + 1
        if max_tokens is not None:
            min_tokens = min(min_tokens, max_tokens)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            prompt_logprobs=1 if scores else None,
        )
        prompt, stops = prompt_of(seq_id, num_prompt), frozenset({STOP_TOKEN})
        seq = Sequence(seq_id, prompt, sampling, stops, attention)
        queued = self.scheduler.num_waiting_tokens
        try:
            self.scheduler.add(seq)
        except InvalidRequestError:
            limit = min(self.config.max_model_len, self.config.kv_tokens)
            assert num_prompt + 1 > limit
        except OverloadedError:
            assert queued > 0
            assert queued + num_prompt > self.config.max_waiting_tokens
        else:
            self.live[seq_id] = seq
            self.outputs[seq_id] = []

    @rule(pick=st.integers(0, 1), ahead=st.booleans())
    def plan(self, pick: int, ahead: bool) -> None:
        self.start_step(self.lane(pick), ahead)

    def start_step(self, lane: Lane, ahead: bool = False) -> StepPlan | None:
        in_flight = self.in_flight[lane]
        is_ahead, num_preemptions = len(in_flight) == 1, self.scheduler.num_preemptions
        plan = self.scheduler.plan(lane, ahead=ahead)
        self.ranks.release(self.scheduler.released())
        if len(in_flight) > ahead:
            assert plan is None
        elif plan is not None:
            assert plan.lane is lane
            in_flight.append(plan)
            self.ranks.start(plan)
            if is_ahead:
                assert self.scheduler.num_preemptions == num_preemptions
                self.check_ahead(plan)
        return plan

    def check_ahead(self, plan: StepPlan) -> None:
        """Nobody who goes on is left out, and nobody who surely ends is in it."""
        planned = {item.seq_id: item for item in plan.work if item.num_tokens == 1}
        for seq in self.live.values():
            if seq.status is not SequenceStatus.RUNNING:
                continue
            num_drawn = len(seq.output_ids) + seq.in_flight - (seq.seq_id in planned)
            assert (seq.seq_id in planned) == (num_drawn < seq.max_new_tokens)

    @rule(pick=st.integers(0, 1))
    def complete(self, pick: int) -> None:
        lane = self.lane(pick)
        if self.in_flight[lane]:
            self.finish_step(lane)

    @rule(pick=st.integers(0, 20))
    def abort(self, pick: int) -> None:
        if not self.live:
            assert not self.scheduler.abort(pick)
            return
        seq_id = sorted(self.live)[pick % len(self.live)]
        assert self.scheduler.abort(seq_id)
        assert not self.scheduler.abort(seq_id)
        del self.live[seq_id]
        self.ranks.release(self.scheduler.released())

    @rule(num_rounds=st.integers(1, 8), ahead=st.booleans())
    def run(self, num_rounds: int, ahead: bool) -> None:
        self.ahead = ahead
        for _ in range(num_rounds):
            self.round()

    def round(self) -> None:
        """Start what can start in all lanes, one step ahead or none, then end a step of each."""
        for lane in self.scheduler.lanes:
            self.start_step(lane)
            if self.ahead:
                self.start_step(lane, ahead=True)
        for lane in self.scheduler.lanes:
            if self.in_flight[lane]:
                self.finish_step(lane)
        self.ranks_agree_with_the_ledger()

    def finish_step(self, lane: Lane) -> None:
        plan = self.in_flight[lane].popleft()
        sampled = self.ranks.finish(plan)
        events = self.scheduler.complete(plan, sampled)
        assert [event.seq.seq_id for event in events] == [
            item.seq_id for item in plan.work if item.sample and item.seq_id in self.live
        ]
        for seq, token, finish in events:
            position = len(seq.prompt_ids) + len(self.outputs[seq.seq_id])
            assert token.token_id == token_at(seq.seq_id, position)
            self.outputs[seq.seq_id].append(token.token_id)
            assert self.outputs[seq.seq_id] == seq.output_ids
            if finish is not None:
                self.check_finish(seq, finish)
                del self.live[seq.seq_id]
        self.ranks.release(self.scheduler.released())

    def check_finish(self, seq: Sequence, finish: FinishReason) -> None:
        outputs = self.outputs[seq.seq_id]
        if finish is FinishReason.STOP:
            assert outputs[-1] == STOP_TOKEN
            assert not seq.sampling.ignore_eos
            assert len(outputs) >= seq.sampling.min_tokens
            return
        assert finish is FinishReason.LENGTH
        held = [rank for rank, _ in self.ranks.pages[seq.seq_id]]
        growing = self.config.ranks(Lane.DECODE)
        assert (
            len(outputs) == seq.sampling.max_tokens
            or seq.num_tokens == self.config.max_model_len
            or seq.num_tokens == self.config.kv_tokens + 1
            or all(held.count(rank) == self.config.pages_per_rank for rank in growing)
        )

    @invariant()
    def ranks_agree_with_the_ledger(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        scheduler.check_integrity()
        for seq_id, pages in self.ranks.pages.items():
            held = [
                (rank, page)
                for rank, first, num in scheduler.ledger.extents(seq_id)
                for page in range(first, first + num)
            ]
            assert held == pages
        assert scheduler.ledger.num_sequences == len(self.ranks.pages)
        held_pages = {page for pages in self.ranks.pages.values() for page in pages}
        assert abs(scheduler.kv_usage * self.config.total_pages - len(held_pages)) < 1e-6
        stats = scheduler.ledger.cache_stats
        assert stats.hit_tokens == self.ranks.num_cached
        assert self.config.prefix_cache or not stats.num_blocks

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # The oldest is never passed over for long: per sequence, its own tokens and a
        # recompute of what was preempted for it bound the steps.
        bound = 10 + self.rounds_per_token * sum(
            seq.num_tokens + (seq.max_new_tokens or 0) for seq in self.live.values()
        )
        rounds = 0
        while any(self.scheduler.has_work(lane) for lane in self.scheduler.lanes):
            rounds += 1
            assert rounds <= bound, f"still {self.live} after {rounds} rounds"
            self.round()
        assert not self.live
        assert not any(self.in_flight.values())
        assert not self.ranks.pages
        assert self.scheduler.kv_usage == 0.0
        assert self.scheduler.num_waiting_tokens == 0
