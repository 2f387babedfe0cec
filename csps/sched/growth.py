"""Gives decoding sequences the blocks of their next tokens, and says who must yield."""

from collections.abc import Sequence as Seq
from typing import NamedTuple

from csps.core.shards import Extent
from csps.sched.config import SchedulerConfig
from csps.sched.ledger import Ledger
from csps.sched.placement import choose_growth_rank
from csps.sched.sequence import Sequence


class Growth(NamedTuple):
    """New extents by seq_id, and the sequences whose blocks were freed, last arrival first."""

    new_extents: dict[int, tuple[Extent, ...]]
    preempted: list[Sequence]


def needs_block(seq: Sequence, ledger: Ledger) -> bool:
    """Whether a running sequence's next token starts a block it does not have."""
    return seq.num_computed == ledger.num_blocks(seq.seq_id) * ledger.block_size


def grow(running: Seq[Sequence], config: SchedulerConfig, ledger: Ledger) -> Growth:
    """Append to the ledger a block for every sequence that needs one, oldest first.

    `running` is sorted by arrival. While no rank has a page, the last of it is preempted:
    its blocks are freed here, which may end up being the sequence that wanted the page.
    """
    left = list(running)
    growth = Growth({}, [])
    masters = [0] * config.num_ranks  # sequences each rank computes in this plan
    for seq in left:
        if not needs_block(seq, ledger):
            masters[ledger.last_rank(seq.seq_id)] += 1
    at = 0
    while at < len(left):
        seq = left[at]
        if not needs_block(seq, ledger):
            at += 1
            continue
        rank = choose_growth_rank(
            ledger.blocks_by_rank(seq.seq_id),
            ledger.free_by_rank(),
            masters,
            stay_whole=seq.num_tokens < config.long_tokens,
        )
        if rank is not None:
            growth.new_extents[seq.seq_id] = (ledger.append(seq.seq_id, rank),)
            masters[rank] += 1
            continue
        # It is `seq` or comes after it, so it was given no block in this plan.
        victim = left.pop()
        if not needs_block(victim, ledger):
            masters[ledger.last_rank(victim.seq_id)] -= 1
        ledger.free(victim.seq_id)
        growth.preempted.append(victim)
    return growth
