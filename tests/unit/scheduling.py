"""What the tests of all schedulers share."""

from collections.abc import Sequence as Seq
from dataclasses import replace

from csps.core.attention import DENSE, AttentionParams
from csps.core.plan import Lane, SampledToken, StepPlan, Work
from csps.core.request import SamplingParams
from csps.sched.config import SchedulerConfig
from csps.sched.scheduler import Scheduler
from csps.sched.sequence import Sequence, TokenEvent

CONFIG = SchedulerConfig(
    num_ranks=2,
    block_size=4,
    pages_per_rank=32,
    stage_tokens=32,
    long_tokens=24,
    max_running=8,
    max_waiting_tokens=1000,
    max_model_len=200,
    prefix_cache=False,  # all prompts begin alike
)


CACHING = replace(CONFIG, prefix_cache=True, token_budget=32)
DOCUMENT = tuple(range(100, 164))  # 16 blocks


def sequence(seq_id: int, num_tokens: int, **sampling: int | tuple[int, ...]) -> Sequence:
    prompt = tuple(range(num_tokens))
    return Sequence(seq_id, prompt, SamplingParams(**sampling), eos_ids=frozenset({999}))


def add(scheduler: Scheduler, seq_id: int, num_tokens: int, **sampling: int) -> Sequence:
    seq = sequence(seq_id, num_tokens, **sampling)
    scheduler.add(seq)
    return seq


def finish(scheduler: Scheduler, plan: StepPlan | None, token_id: int = 7) -> list[TokenEvent]:
    """End a step in which `token_id` is drawn for everyone."""
    assert plan is not None
    sampled = {
        item.seq_id: SampledToken(item.seq_id, token_id) for item in plan.work if item.sample
    }
    events = scheduler.complete(plan, sampled)
    scheduler.check_integrity()
    return events


def step(scheduler: Scheduler, lane: Lane) -> StepPlan | None:
    """One step of a lane, start to end."""
    plan = scheduler.plan(lane)
    if plan is not None:
        finish(scheduler, plan)
    return plan


def planned(plan: StepPlan | None) -> list[int]:
    return [] if plan is None else [item.seq_id for item in plan.work]


def ask(
    scheduler: Scheduler,
    seq_id: int,
    prompt: Seq[int],
    attention: AttentionParams = DENSE,
    **sampling: int,
) -> Sequence:
    """As `add`, with a prompt of its own: for schedulers that have a prefix cache."""
    seq = Sequence(seq_id, tuple(prompt), SamplingParams(**sampling), attention=attention)
    scheduler.add(seq)
    return seq


def serve(
    scheduler: Scheduler,
    seq_id: int,
    prompt: Seq[int],
    attention: AttentionParams = DENSE,
    **sampling: int,
) -> Sequence:
    """A sequence from start to end."""
    seq = ask(scheduler, seq_id, prompt, attention, **{"max_tokens": 1, **sampling})
    while any(scheduler.has_work(lane) for lane in scheduler.lanes):
        plans = [step(scheduler, lane) for lane in scheduler.lanes]
        assert any(plan is not None for plan in plans), "what is there never starts"
    return seq


def work_of(plan: StepPlan | None, seq_id: int) -> Work:
    assert plan is not None
    return next(item for item in plan.work if item.seq_id == seq_id)
