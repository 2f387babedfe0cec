"""Prefill lane and decode lane side by side: the schedule of `csps` and `ring`.

Prefill places all blocks of a sequence when it first starts (packing.py says who starts
when), so it never stops halfway for want of KV. It begins behind the blocks that the prefix
cache has, which stay on the ranks where they are. After its last token the sequence joins
the decode lane, where it is; no KV moves. Decode gives every running sequence one token a
step. When a block is needed and no rank has a page, the running sequence that arrived last
loses its KV and waits again in order of arrival; later its prompt and output are
prefilled as one. The oldest therefore always gets on, and everything ends.

Ranks may be dedicated. Prompts are computed, and so held, by prefill ranks only; the blocks
that decode begins are on decode ranks only, and so is their master, the rank that owns the
block being written. While a prompt's last block fills up its master is the prefill rank that
has it: a block never moves, and there is at most one of them per sequence.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence as Seq

from csps.core.plan import Lane, Work
from csps.core.shards import Extent
from csps.sched.config import SchedulerConfig
from csps.sched.growth import grow
from csps.sched.packing import Candidate, Start, StepPacker, stage_candidate, waiting_candidate
from csps.sched.prefix_cache import Prefix
from csps.sched.scheduler import Scheduler
from csps.sched.sequence import Sequence, SequenceStatus
from csps.sched.work import decode_work, prefill_work


class DisaggScheduler(Scheduler):
    """Decides the steps of a prefill lane and a decode lane."""

    lanes = (Lane.PREFILL, Lane.DECODE)

    # Ownership: _queue has the candidate of every waiting sequence, in the order of candidates.

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self._queue: list[Candidate] = []
        self._queued: dict[int, Candidate] = {}  # by seq_id

    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self._find_prefix(seq)  # its place in the queue depends on what is left to compute

    def has_work(self, lane: Lane) -> bool:
        if lane is Lane.PREFILL:
            return bool(self._waiting or self._prefilling)
        return bool(self._running)

    def _plan_work(self, lane: Lane) -> list[Work]:
        return self._plan_prefill() if lane is Lane.PREFILL else self._plan_decode()

    def _plan_ahead(self, lane: Lane) -> list[Work]:
        """Of decode: a prefill step takes so long that what comes between two does not count."""
        following = self._follow() if lane is Lane.DECODE else None
        return self._decode(following) if following else []

    # Prefill lane

    def _plan_prefill(self) -> list[Work]:
        packer = StepPacker(self.config, self.ledger)
        work: list[Work] = []
        has_room = True  # until a waiting sequence finds no slot or no KV
        candidates = self._queue.copy()
        for seq in self._prefilling:
            insort(candidates, stage_candidate(seq, self.config))
        for _, num_tokens, split, seq in candidates:
            if num_tokens > packer.room[split]:  # most of a long queue
                continue
            if seq.status is SequenceStatus.PREFILLING:
                packer.continue_stage(seq.stages[0])
                work.append(self._next_stage(seq))
            elif has_room:
                start = None
                if self._free_slots and not self._lacks_kv(seq):
                    start = packer.find_start(seq.num_tokens, self._find_prefix(seq))
                has_room = start is not None
                if start is not None:
                    packer.start(start)
                    work.append(self._first_stage(seq, start))
        self._clock += sum(item.num_tokens for item in work)
        return work

    def _first_stage(self, seq: Sequence, start: Start) -> Work:
        extents = self.ledger.place(seq.seq_id, start.slices, start.prefix)
        seq.stages = start.stages
        self._start(seq, start.prefix)
        return self._next_stage(seq, extents)

    def _next_stage(self, seq: Sequence, new_extents: tuple[Extent, ...] = ()) -> Work:
        slices, *later = seq.stages
        seq.stages = tuple(later)
        return prefill_work(seq, slices, new_extents)

    def _find_prefix(self, seq: Sequence) -> Prefix:
        prefix = super()._find_prefix(seq)
        self._dequeue(seq)
        self._enqueue(seq)
        return prefix

    def _list(self, seq: Sequence, status: SequenceStatus) -> None:
        super()._list(seq, status)
        if status is SequenceStatus.WAITING:
            self._enqueue(seq)

    def _unlist(self, seq: Sequence) -> None:
        super()._unlist(seq)
        if seq.status is SequenceStatus.WAITING:
            self._dequeue(seq)

    def _enqueue(self, seq: Sequence) -> None:
        self._queued[seq.seq_id] = candidate = waiting_candidate(seq, self.config)
        insort(self._queue, candidate)

    def _dequeue(self, seq: Sequence) -> None:
        candidate = self._queued.pop(seq.seq_id)
        del self._queue[bisect_left(self._queue, candidate)]

    def check_integrity(self) -> None:
        super().check_integrity()
        waiting = sorted(waiting_candidate(seq, self.config) for seq in self._waiting)
        assert self._queue == waiting, "the order of waiting sequences is not up to date"

    # Decode lane

    def _plan_decode(self) -> list[Work]:
        return self._decode(self._running)

    def _decode(self, running: Seq[Sequence]) -> list[Work]:
        """One token of each, but of those that lose their KV."""
        growth = grow(running, self.config, self.ledger)
        for seq in growth.preempted:
            self._preempt(seq)
        return [
            decode_work(
                seq,
                self.ledger.last_rank(seq.seq_id),
                growth.new_extents.get(seq.seq_id, ()),
            )
            for seq in running
            if seq.status is SequenceStatus.RUNNING
        ]
