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

import math
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
        # Tokens left for stages that stay whole and for those that are split. The first of a
        # kind always fits, or it never would.
        self.room: list[float] = [math.inf, math.inf]

    def continue_stage(self, slices: tuple[Slice, ...]) -> None:
        """Take the next stage of a sequence that has its KV, for which there is room."""
        self._take(slices, split=True)

    def has_tokens(self, num_new: int) -> bool:
        """Whether a waiting sequence with `num_new` tokens to compute can start in this step."""
        num_tokens, split = _first_stage(num_new, self._config)
        return num_tokens <= self.room[split]

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
        self._take(start.stages[0], is_split(_tokens_of(start.slices), self._config))

    def _take(self, slices: tuple[Slice, ...], split: bool) -> None:
        self.room[split] = min(self.room[split], self._config.stage_tokens) - _tokens_of(slices)
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
    return Candidate(prefill_order(seq, config.ageing), *_first_stage(seq.num_left, config), seq)


def stage_candidate(seq: Sequence, config: SchedulerConfig) -> Candidate:
    """The next stage of a sequence under way."""
    return Candidate(prefill_order(seq, config.ageing), _tokens_of(seq.stages[0]), True, seq)


def _first_stage(num_new: int, config: SchedulerConfig) -> tuple[int, bool]:
    """Tokens of the first of `num_new` tokens' stages, and whether it is split."""
    split = is_split(num_new, config)
    return (first_stage_tokens(num_new, config) if split else num_new), split


def prefill_order(seq: Sequence, ageing: float) -> tuple[float, int]:
    """Sort key of the prefill lane: tokens left to prefill, and how late it came.

    Arrival is in virtual time, which counts planned prompt tokens: once the lane has planned
    r / ageing of them, nobody who comes then can overtake a sequence that has r left. A
    preempted sequence counts as nothing left, its reader waits in the middle of an answer.
    """
    left = 0 if seq.output_ids else seq.num_left
    return (seq.arrival * ageing + left, seq.arrival)


def _tokens_of(slices: Iterable[Slice]) -> int:
    return sum(piece.num_tokens for piece in slices)
