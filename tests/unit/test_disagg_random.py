"""DisaggScheduler under random arrivals and aborts."""

from hypothesis import given, settings
from hypothesis import strategies as st

from csps.core.plan import Lane, StepPlan
from csps.core.request import SamplingParams
from csps.core.shards import num_blocks
from csps.sched.config import SchedulerConfig
from csps.sched.disagg import DisaggScheduler
from csps.sched.sequence import Sequence
from tests.unit.scheduler_machine import SchedulerMachine
from tests.unit.simulated_ranks import SimulatedRanks, prompt_of


class DisaggMachine(SchedulerMachine):
    def draw_scheduler(self, data: st.DataObject) -> DisaggScheduler:
        num_ranks = data.draw(st.integers(1, 4))
        some_ranks = st.lists(st.integers(0, num_ranks - 1), unique=True).map(tuple)
        self.prompt_blocks: dict[int, int] = {}
        return DisaggScheduler(
            SchedulerConfig(
                num_ranks=num_ranks,
                block_size=data.draw(st.integers(1, 4)),
                pages_per_rank=data.draw(st.integers(2, 8)),
                stage_tokens=data.draw(st.integers(1, 24)),
                long_tokens=data.draw(st.integers(1, 40)),
                max_running=data.draw(st.integers(1, 6)),
                max_waiting_tokens=data.draw(st.integers(20, 200)),
                max_model_len=data.draw(st.integers(8, 80)),
                ageing=data.draw(st.sampled_from([0.01, 0.5, 2.0])),
                prefill_ranks=data.draw(some_ranks),
                decode_ranks=data.draw(some_ranks),
                prefix_cache=data.draw(st.sampled_from([True, True, False])),
            )
        )

    def start_step(self, lane: Lane, ahead: bool = False) -> StepPlan | None:
        plan = super().start_step(lane, ahead)
        if plan is not None:
            self.check_ranks(plan)
        return plan

    def check_ranks(self, plan: StepPlan) -> None:
        """Each lane takes pages on its ranks; decode completes a prompt's last block elsewhere."""
        lane_ranks = set(self.config.ranks(plan.lane))
        for item in plan.work:
            size = self.config.block_size
            blocks = num_blocks(item.stop, size)
            pages = self.ranks.pages[item.seq_id]
            if item.new_extents:  # cached blocks stay on the ranks where they are
                new = pages[item.start // size :] if item.sampling else pages[-1:]
                assert {rank for rank, _ in new} <= lane_ranks
            if plan.lane is Lane.PREFILL:
                self.prompt_blocks[item.seq_id] = blocks
            if blocks > self.prompt_blocks[item.seq_id] or plan.lane is Lane.PREFILL:
                assert {piece.rank for piece in item.slices} <= lane_ranks


TestDisaggMachine = DisaggMachine.TestCase
TestDisaggMachine.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)


@settings(max_examples=12, deadline=None)
@given(
    num_ranks=st.integers(1, 4),
    block_size=st.sampled_from([1, 4, 16]),
    num_prompt=st.integers(24, 400),
    stage_tokens=st.sampled_from([16, 100, 1000]),
    num_short=st.integers(0, 3),
)
def test_shards_of_a_long_sequence_stay_balanced(
    num_ranks: int, block_size: int, num_prompt: int, stage_tokens: int, num_short: int
) -> None:
    config = SchedulerConfig(
        num_ranks=num_ranks,
        block_size=block_size,
        pages_per_rank=1600 // block_size,
        stage_tokens=stage_tokens,
        long_tokens=24,
        max_running=8,
        max_waiting_tokens=1000,
        max_model_len=1000,
    )
    scheduler, ranks = DisaggScheduler(config), SimulatedRanks(config)
    for seq_id in range(1 + num_short):
        prompt = prompt_of(seq_id, 10 if seq_id else num_prompt)
        scheduler.add(Sequence(seq_id, prompt, SamplingParams(max_tokens=100 if seq_id else 502)))
    held = (0,) * num_ranks
    while any(scheduler.has_work(lane) for lane in scheduler.lanes):
        for lane in scheduler.lanes:
            plan = scheduler.plan(lane)
            if plan is None:
                continue
            ranks.start(plan)
            if scheduler.ledger.holds(0):
                held = scheduler.ledger.blocks_by_rank(0)
                assert max(held) <= sum(held) / num_ranks + 2
            scheduler.complete(plan, ranks.finish(plan))
            ranks.release(scheduler.released())
    # Every token but the last drawn was computed: 501 of the output.
    assert sum(held) == num_blocks(num_prompt + 501, block_size)
