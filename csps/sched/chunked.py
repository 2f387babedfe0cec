"""Chunked prefill in the same steps as decode: the schedule of `sarathi` and `shift`.

Source: Sarathi-Serve (OSDI'24), section 4. A step computes at most `token_budget` new
tokens:

1. Every running sequence decodes one token. When there is no page for it, the sequence that
   arrived last of all that hold KV loses it and goes back to the head of the queue; later
   its prompt and output are prefilled as one. The oldest therefore always gets on.
2. Sequences whose prefill has begun get what is left, in order of arrival: a chunk of a
   prompt may end anywhere.
3. Waiting sequences start in order of arrival, as long as tokens are left and there is KV
   for the whole prompt above the watermark. They begin behind the blocks that the prefix
   cache has.

So a long prompt never stalls those who decode: it only takes what they leave. Nor do decodes
ever outnumber the budget: the step that makes one more of them computed the last token of
its prompt out of what all others had left.

KV is split by head over the ranks: every rank has every block at the same page, which makes
one shard, rank 0 of the ledger.
"""

from collections.abc import Sequence as Seq

from csps.core.plan import Lane, Work
from csps.core.shards import Extent, Slice, num_blocks
from csps.sched.config import SchedulerConfig
from csps.sched.growth import Growth, grow
from csps.sched.prefix_cache import Prefix
from csps.sched.scheduler import Scheduler, by_arrival
from csps.sched.sequence import Sequence
from csps.sched.work import decode_work, prefill_work


class ChunkedScheduler(Scheduler):
    """Decides the steps of one lane that decodes and prefills. `config.num_ranks` is 1."""

    lanes = (Lane.MIXED,)

    def __init__(self, config: SchedulerConfig) -> None:
        assert config.num_ranks == 1, f"one shard of KV, not {config.num_ranks}"
        super().__init__(config)

    def has_work(self, lane: Lane) -> bool:
        return bool(self._waiting or self._prefilling or self._running)

    def _plan_work(self, lane: Lane) -> list[Work]:
        return self._fill(self._decode())

    def _plan_ahead(self, lane: Lane) -> list[Work]:
        following = self._follow()
        if following is None:
            return []
        growth = grow(following, self.config, self.ledger)
        assert not growth.preempted, "there was room"
        return self._fill(_decode_works(following, growth))

    def _fill(self, work: list[Work]) -> list[Work]:
        """A step that has `work` of those who decode, with prompts in the rest of its budget."""
        prefilling = [seq for seq in self._prefilling if not seq.closing]
        unfinished = [seq for seq in prefilling if seq.num_planned < seq.num_tokens]
        # Those that end their prompt in the step under way decode in the one behind this.
        left = self.config.token_budget - len(work) - (len(prefilling) - len(unfinished))
        assert left >= 0, f"{len(work)} sequences decode"
        for seq in unfinished:
            if left == 0:
                break
            work.append(_chunk(seq, left))
            left -= work[-1].num_tokens
        while left and self._waiting and self._free_slots:
            seq = self._waiting[0]
            if self._lacks_kv(seq):
                break
            prefix = self._find_prefix(seq)
            if not self._has_kv(seq, prefix):
                break
            piece = Slice(0, prefix.num_tokens, seq.num_tokens)
            extents = self.ledger.place(seq.seq_id, (piece,), prefix)
            self._start(seq, prefix)
            work.append(_chunk(seq, left, extents))
            left -= work[-1].num_tokens
        return work

    def _decode(self) -> list[Work]:
        """One token of every running sequence that keeps its KV."""
        holding = sorted(self._prefilling + self._running, key=by_arrival)
        growth = grow(holding, self.config, self.ledger)
        for seq in growth.preempted:
            self._preempt(seq)
        return _decode_works(self._running, growth)

    def _has_kv(self, seq: Sequence, prefix: Prefix) -> bool:
        """Whether a waiting sequence can have its KV now. A prefix never takes more pages."""
        blocks = num_blocks(seq.num_tokens - prefix.num_tokens, self.config.block_size)
        # Alone it may have everything, or it would wait for ever.
        keep = self.config.watermark_pages if self.ledger.num_sequences else 0
        return self.ledger.free_by_rank(prefix)[0] - blocks >= keep


def _decode_works(running: Seq[Sequence], growth: Growth) -> list[Work]:
    return [decode_work(seq, 0, growth.new_extents.get(seq.seq_id, ())) for seq in running]


def _chunk(seq: Sequence, budget: int, new_extents: tuple[Extent, ...] = ()) -> Work:
    """The next tokens of a prompt, at most `budget`."""
    start = seq.num_planned
    stop = min(start + budget, seq.num_tokens)
    return prefill_work(seq, (Slice(0, start, stop),), new_extents)
