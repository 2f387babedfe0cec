"""ChunkedScheduler under random arrivals and aborts."""

from math import inf

from hypothesis import settings
from hypothesis import strategies as st

from csps.core.plan import Lane, StepPlan
from csps.sched.chunked import ChunkedScheduler
from csps.sched.config import SchedulerConfig
from csps.sched.sequence import Sequence, SequenceStatus
from tests.unit.scheduler_machine import SchedulerMachine


class ChunkedMachine(SchedulerMachine):
    # One round may compute a single token, and a sequence is recomputed more than once.
    rounds_per_token = 20

    def draw_scheduler(self, data: st.DataObject) -> ChunkedScheduler:
        return ChunkedScheduler(
            SchedulerConfig(
                num_ranks=1,
                block_size=data.draw(st.integers(1, 4)),
                pages_per_rank=data.draw(st.integers(2, 24)),
                max_running=data.draw(st.integers(1, 6)),
                max_waiting_tokens=data.draw(st.integers(20, 200)),
                max_model_len=data.draw(st.integers(8, 80)),
                token_budget=data.draw(st.integers(1, 24)),
                prefix_cache=data.draw(st.sampled_from([True, True, False])),
            )
        )

    def start_step(self, lane: Lane, ahead: bool = False) -> StepPlan | None:
        running = [
            seq
            for seq in self.live.values()
            if seq.status is SequenceStatus.RUNNING
            and len(seq.output_ids) + seq.in_flight != seq.max_new_tokens
        ]
        # Their prompts end in the step under way.
        joining = [
            seq
            for seq in self.live.values()
            if seq.status is SequenceStatus.PREFILLING and seq.num_planned == seq.num_tokens
        ]
        num_preemptions = self.scheduler.num_preemptions
        plan = super().start_step(lane, ahead)
        if plan is not None:
            num_preempted = self.scheduler.num_preemptions - num_preemptions
            self.check_plan(plan, running, joining, num_preempted)
        return plan

    def check_plan(
        self,
        plan: StepPlan,
        running: list[Sequence],
        joining: list[Sequence],
        num_preempted: int,
    ) -> None:
        """`running`, `joining` before the plan, which preempted `num_preempted`."""
        # Whoever joins finds room in the next one.
        num_tokens = plan.num_tokens + len(joining)
        assert num_tokens <= self.config.token_budget
        planned = {item.seq_id: item for item in plan.work}
        # Whoever decodes gets its token, whatever prompts there are.
        stalled = [seq for seq in running if seq.seq_id not in planned]
        assert len(stalled) <= num_preempted
        # First come, first served: no prompt gets anything before older ones are served.
        prefilling = [
            seq
            for seq in self.live.values()
            if seq.status is SequenceStatus.PREFILLING and seq not in joining
        ]
        served = [seq.arrival for seq in prefilling if seq.seq_id in planned]
        passed_over = [seq.arrival for seq in prefilling if seq.seq_id not in planned]
        passed_over += [
            seq.arrival for seq in self.live.values() if seq.status is SequenceStatus.WAITING
        ]
        assert max(served, default=-1) < min(passed_over, default=inf)
        # Tokens are left only when there is no prompt to spend them on.
        if num_tokens < self.config.token_budget:
            assert all(planned[seq.seq_id].stop == seq.num_tokens for seq in prefilling)


TestChunkedMachine = ChunkedMachine.TestCase
TestChunkedMachine.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
