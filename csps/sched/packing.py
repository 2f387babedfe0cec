"""Fills one step of the prefill lane: which stages run, which waiting sequences start.

A step carries long sequences' stages and whole short sequences, each kind up to
`stage_tokens` new tokens. So a short prompt waits one step for a long one, not all of its
stages, and a step's activations stay bounded.

Who goes first: shortest remaining prefill first, with ageing (`prefill_order`). A long
prompt under way takes part with what is left of it, so a shorter one may go before its next
stage. In this order:

- Only tokens that the prefix cache does not have are computed, and count. Where they are few
  they stay on one rank, wherever the cached blocks are.
- A sequence for which the step has no tokens left waits for the next step. The first of its
  kind always has enough.
- Once a sequence finds no KV, or no slot, nothing that comes after it starts. What runs gives
  its pages back when it ends, so the wait is bounded. Those under way have their KV, and go
  on.
"""

from collections.abc import Iterable
from typing import NamedTuple

from csps.core.plan import Lane
from csps.core.shards import Slice, tokens_by_rank
from csps.sched.config import SchedulerConfig
from csps.sched.ledger import Ledger
from csps.sched.placement import (
    Stages,
    choose_whole_rank,
    first_stage_tokens,
    is_split,
    split_stages,
)
from csps.sched.prefix_cache import NO_PREFIX, Prefix
from csps.sched.sequence import Sequence


class TokenBudget:
    """New tokens of one kind in a step. The first item always fits, or it never would."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0

    @property
    def full(self) -> bool:
        return self._used >= self._limit

    def fits(self, num_tokens: int) -> bool:
        return self._used == 0 or self._used + num_tokens <= self._limit

    def take(self, num_tokens: int) -> None:
        self._used += num_tokens


class Start(NamedTuple):
    """Cached blocks that a sequence begins with, and the stages that compute the rest."""

    prefix: Prefix
    stages: Stages

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Of all stages, in position order."""
        return tuple(piece for stage in self.stages for piece in stage)


class StepPacker:
    """One prefill step being filled. Reads the ledger, changes nothing but itself."""

    def __init__(self, config: SchedulerConfig, ledger: Ledger) -> None:
        self._config = config
        self._ledger = ledger
        self._loads = [0] * config.num_ranks  # tokens each rank computes in this step
        self._split = TokenBudget(config.stage_tokens)
        self._whole = TokenBudget(config.stage_tokens)

    @property
    def full(self) -> bool:
        return self._split.full and self._whole.full

    def continue_stage(self, slices: tuple[Slice, ...]) -> bool:
        """Take the next stage of a sequence that has its KV; False if tokens ran out."""
        num_tokens = _num_tokens(slices)
        if not self._split.fits(num_tokens):
            return False
        self._take(self._split, slices)
        return True

    def has_tokens(self, num_new: int) -> bool:
        """Whether a waiting sequence with `num_new` tokens to compute can start in this step."""
        if is_split(num_new, self._config):
            return not self._split.full and self._split.fits(
                first_stage_tokens(num_new, self._config)
            )
        return self._whole.fits(num_new)

    def fits(self, candidate: "Candidate") -> bool:
        """Whether the step has tokens for a candidate's first stage."""
        return (self._split if candidate.split else self._whole).fits(candidate.num_tokens)

    def find_start(self, num_tokens: int, prefix: Prefix) -> Start | None:
        """How a waiting sequence of `num_tokens` starts, None while it cannot.

        Without `prefix` if there is no room behind it: pages of it that nobody reads are free
        then, so whoever is alone always can.
        """
        for begin in (prefix, NO_PREFIX):
            if self.has_tokens(num_tokens - begin.num_tokens):
                start = self._find_place(num_tokens, begin)
                if start is not None:
                    return start
        return None

    def _find_place(self, num_tokens: int, prefix: Prefix) -> Start | None:
        config, ledger = self._config, self._ledger
        at = prefix.num_tokens
        free = ledger.free_by_rank(prefix)
        if is_split(num_tokens - at, config):
            start = Start(prefix, split_stages(at, num_tokens, config))
            return start if self._has_kv(start, free) else None
        starts = {
            rank: Start(prefix, ((Slice(rank, at, num_tokens),),))
            for rank in config.ranks(Lane.PREFILL)
        }
        rank = choose_whole_rank(
            [rank for rank, start in starts.items() if self._has_kv(start, free)],
            ledger.prefix_by_rank(prefix),
            free,
            self._loads,
        )
        return None if rank is None else starts[rank]

    def _has_kv(self, start: Start, free: list[int]) -> bool:
        """Whether there are pages to start with, and besides what decode is to have.

        Nothing need be left when nobody holds KV: it would be waited for in vain.
        """
        ledger = self._ledger
        need = ledger.need(start.slices, start.prefix.num_tokens)
        if any(num > has for num, has in zip(need, free, strict=True)):
            return False
        left = sum(free[rank] - need[rank] for rank in self._config.ranks(Lane.DECODE))
        return ledger.num_sequences == 0 or left >= self._config.watermark_pages

    def start(self, start: Start) -> None:
        """Take the first stage of a sequence that starts."""
        split = is_split(_num_tokens(start.slices), self._config)
        self._take(self._split if split else self._whole, start.stages[0])

    def _take(self, budget: TokenBudget, slices: tuple[Slice, ...]) -> None:
        budget.take(_num_tokens(slices))
        for rank, num in enumerate(tokens_by_rank(slices, self._config.num_ranks)):
            self._loads[rank] += num


class Candidate(NamedTuple):
    """A sequence that a step may take, in its place in the order.

    `num_tokens`: of its next stage, which is `split` over the ranks or whole on one.
    """

    order: tuple[float, int]  # no two alike
    num_tokens: int
    split: bool
    seq: Sequence


def waiting_candidate(seq: Sequence, config: SchedulerConfig) -> Candidate:
    """It stands until the sequence starts, or finds more or less of its prefix cached."""
    num_new = seq.num_left
    split = is_split(num_new, config)
    num_tokens = first_stage_tokens(num_new, config) if split else num_new
    return Candidate(prefill_order(seq, config.ageing), num_tokens, split, seq)


def prefill_order(seq: Sequence, ageing: float) -> tuple[float, int]:
    """Sort key of the prefill lane: tokens left to prefill, and how late it came.

    Arrival is in virtual time, which counts planned prompt tokens: once the lane has planned
    r / ageing of them, nobody who comes then can overtake a sequence that has r left. A
    preempted sequence counts as nothing left, its reader waits in the middle of an answer.
    """
    left = 0 if seq.output_ids else seq.num_left
    return (seq.arrival * ageing + left, seq.arrival)


def _num_tokens(slices: Iterable[Slice]) -> int:
    return sum(piece.num_tokens for piece in slices)
