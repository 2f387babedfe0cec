"""Prefill lane and decode lane side by side: the schedule of `csps` and `ring`.

Prefill places all blocks of a sequence when it first starts (packing.py says who starts
when), so it never stops halfway for want of KV. After its last token the sequence joins
the decode lane, where it is; no KV moves. Decode gives every running sequence one token a
step. When a block is needed and no rank has a page, the running sequence that arrived last
loses its KV and waits again in order of arrival; later its prompt and output are
prefilled as one. The oldest therefore always gets on, and everything ends.
"""

from csps.core.plan import Lane, Work
from csps.core.shards import Extent
from csps.sched.growth import grow
from csps.sched.packing import OvertakeGuard, StepPacker, all_slices
from csps.sched.scheduler import Scheduler
from csps.sched.sequence import Sequence
from csps.sched.work import decode_work, prefill_work


class DisaggScheduler(Scheduler):
    """Decides the steps of a prefill lane and a decode lane."""

    lanes = (Lane.PREFILL, Lane.DECODE)

    def has_work(self, lane: Lane) -> bool:
        if lane is Lane.PREFILL:
            return bool(self._waiting or self._prefilling)
        return bool(self._running)

    def _plan_work(self, lane: Lane) -> list[Work]:
        return self._plan_prefill() if lane is Lane.PREFILL else self._plan_decode()

    # Prefill lane

    def _plan_prefill(self) -> list[Work]:
        packer = StepPacker(self.config, self.ledger)
        work = []
        for seq in self._prefilling:
            # One that does not fit is not starved: those before it end, then it is first.
            if packer.continue_stage(seq.stages[0]):
                work.append(self._next_stage(seq))
        return work + self._start_waiting(packer)

    def _start_waiting(self, packer: StepPacker) -> list[Work]:
        """Start waiting sequences while the step and KV have room (rules: packing.py)."""
        guard = OvertakeGuard(self.config.max_running)
        work = []
        for seq in list(self._waiting):
            if self._free_slots == 0 or packer.full or not guard.allows(seq):
                break
            if not packer.has_tokens(seq.num_tokens):
                continue
            stages = packer.find_place(seq.num_tokens)
            if stages is None:
                guard.block(seq)
                continue
            packer.start(seq.num_tokens, stages)
            guard.charge(seq)
            extents = self.ledger.place(seq.seq_id, all_slices(stages))
            seq.stages = stages
            self._start(seq)
            work.append(self._next_stage(seq, extents))
        return work

    def _next_stage(self, seq: Sequence, new_extents: tuple[Extent, ...] = ()) -> Work:
        slices, *later = seq.stages
        seq.stages = tuple(later)
        return prefill_work(seq, slices, new_extents)

    # Decode lane

    def _plan_decode(self) -> list[Work]:
        growth = grow(self._running, self.config, self.ledger)
        for seq in growth.preempted:
            self._preempt(seq)
        return [
            decode_work(
                seq,
                self.ledger.last_rank(seq.seq_id),
                growth.new_extents.get(seq.seq_id, ()),
            )
            for seq in self._running
        ]
