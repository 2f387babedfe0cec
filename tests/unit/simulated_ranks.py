"""Ranks that see plans alone: pages remember which tokens' KV they hold, and how computed."""

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from csps.core.attention import DENSE, AttentionParams
from csps.core.plan import Lane, SampledToken, StepPlan, Work
from csps.sched.config import SchedulerConfig


class Entry(NamedTuple):
    """What KV at a position says: all tokens up to there, and how it was computed."""

    history: int
    attention: AttentionParams


def token_at(seq_id: int, position: int) -> int:
    """The token every prompt has, and every step draws, at a position: recomputing agrees.

    Sequences of one parity begin alike, some only up to a point.
    """
    fork = (0, 1000, 6, 25)[seq_id // 2 % 4]
    return ((seq_id % 2 if position < fork else seq_id) * 31 + position * 7) % 41


@cache
def history(seq_id: int, position: int) -> int:
    """Names all tokens up to a position."""
    before = history(seq_id, position - 1) if position else 0
    return hash((before, token_at(seq_id, position)))


def prompt_of(seq_id: int, num_tokens: int) -> tuple[int, ...]:
    return tuple(token_at(seq_id, position) for position in range(num_tokens))


class SimulatedRanks:
    """State of all ranks, rebuilt from plans and released ids; a KV entry names its token."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.block_size = config.block_size
        self.pages: dict[int, list[tuple[int, int]]] = {}  # seq_id: (rank, page) by block
        self.computed: dict[int, int] = {}
        self.attention: dict[int, AttentionParams] = {}
        self.drawn: dict[int, set[int]] = {}  # positions whose token a step has drawn, or will
        self.num_cached = 0  # tokens that were read and not computed
        self.kv: dict[tuple[int, int, int], Entry] = {}
        self.under_way: dict[tuple[Lane, int], set[int]] = {}  # sequences by step
        self.writing: dict[tuple[Lane, int], set[tuple[int, int, int]]] = {}  # by step
        self.next_step = dict.fromkeys(Lane, 0)

    def release(self, seq_ids: Iterable[int]) -> None:
        for seq_id in seq_ids:
            del self.pages[seq_id], self.computed[seq_id], self.attention[seq_id]
            self.drawn.pop(seq_id, None)
            for (lane, step_id), computed in self.under_way.items():
                assert seq_id not in computed, f"{lane} step {step_id} has {seq_id}"

    def start(self, plan: StepPlan) -> None:
        """Write the KV of a plan: at once, so that a page reused too early shows later."""
        assert plan.step_id == self.next_step[plan.lane]
        self.next_step[plan.lane] += 1
        assert plan.work
        assert len({item.seq_id for item in plan.work}) == len(plan.work)
        self.under_way[plan.lane, plan.step_id] = {item.seq_id for item in plan.work}
        writing = self.writing[plan.lane, plan.step_id] = set()
        for item in plan.work:
            self._start(item, writing)

    def _start(self, item: Work, new: set[tuple[int, int, int]]) -> None:
        assert (item.sampling is not None) == (item.seq_id not in self.pages)
        is_new = item.seq_id not in self.pages
        pages = self.pages.setdefault(item.seq_id, [])
        for rank, first, num in item.new_extents:
            pages.extend((rank, page) for page in range(first, first + num))
        if is_new:
            self.attention[item.seq_id] = item.attention
            self.computed[item.seq_id] = item.start
            self.num_cached += item.start
            assert item.start % self.block_size == 0, "a block is cached in part"
            cached = {self._slot(item.seq_id, position) for position in range(item.start)}
            for writing in self.writing.values():
                assert not writing & cached, "KV is read before it is there"
        assert item.start == self.computed[item.seq_id]
        at = item.start
        for piece in item.slices:
            assert piece.start == at, "a position is computed twice or never"
            assert piece.num_tokens > 0
            for position in range(piece.start, piece.stop):
                slot = self._slot(item.seq_id, position)
                assert slot[0] == piece.rank, "the rank that computes a block must own it"
                token_id = token_at(item.seq_id, position)
                if item.pending:
                    assert item.token_ids == (0,)
                    assert position in self.drawn[item.seq_id], "nobody draws what it waits for"
                else:
                    assert item.token_ids[position - item.start] == token_id
                entry = Entry(history(item.seq_id, position), self.attention[item.seq_id])
                self.kv[slot] = entry
                new.add(slot)
            at = piece.stop
        assert at == item.stop
        if item.sample:
            self.drawn.setdefault(item.seq_id, set()).add(at)
        self.computed[item.seq_id] = at

    def finish(self, plan: StepPlan) -> dict[int, SampledToken]:
        """Read the KV each sequence of the plan attends to, then draw.

        It is of these tokens, computed exactly or as the sequence itself is.
        """
        sampled = {}
        for item in plan.work:
            for position in range(item.stop):
                entry = self.kv[self._slot(item.seq_id, position)]
                assert entry.history == history(item.seq_id, position)
                assert entry.attention in (DENSE, self.attention[item.seq_id])
            if item.sample:
                token = SampledToken(item.seq_id, token_at(item.seq_id, item.stop))
                sampled[item.seq_id] = token
        del self.writing[plan.lane, plan.step_id], self.under_way[plan.lane, plan.step_id]
        return sampled

    def _slot(self, seq_id: int, position: int) -> tuple[int, int, int]:
        """Rank, page and place in it."""
        rank, page = self.pages[seq_id][position // self.block_size]
        return rank, page, position % self.block_size
