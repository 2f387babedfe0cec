"""Gives decoding sequences the blocks of their next tokens, and says who must yield."""

from collections.abc import Sequence as Seq
from typing import NamedTuple

from csps.core.plan import Lane
from csps.core.shards import Extent
from csps.sched.config import SchedulerConfig
from csps.sched.ledger import Ledger
from csps.sched.placement import choose_growth_rank
from csps.sched.sequence import Sequence


class Growth(NamedTuple):
    """New extents by seq_id, and the sequences whose blocks were freed."""

    new_extents: dict[int, tuple[Extent, ...]]
    preempted: list[Sequence]


def needs_block(seq: Sequence, ledger: Ledger) -> bool:
    """Whether a running sequence's next token starts a block it does not have."""
    return ledger.is_full(seq.seq_id, seq.num_planned)


def has_room(running: Seq[Sequence], config: SchedulerConfig, ledger: Ledger) -> bool:
    """Whether `grow` would find a block for all of `running` without taking anyone's."""
    wanted = sum(needs_block(seq, ledger) for seq in running)
    return wanted <= sum(ledger.free_pages(rank) for rank in config.ranks(Lane.DECODE))


def grow(holding: Seq[Sequence], config: SchedulerConfig, ledger: Ledger) -> Growth:
    """Append to the ledger a block for every sequence that needs one, oldest first.

    `holding` are the sequences that may lose their KV, sorted by arrival; those in prefill
    need no block, they have all of their prompt's. While no decode rank has a page, the last
    one that holds some there is preempted: its blocks are freed here. That may end up being
    the sequence that wanted the page.
    """
    ranks = config.ranks(Lane.DECODE)
    left = list(holding)
    growth = Growth({}, [])
    masters: list[int] = []  # counted when first wanted: most steps need no block
    is_full = ledger.is_full
    for seq in [seq for seq in holding if is_full(seq.seq_id, seq.num_planned)]:
        while ledger.holds(seq.seq_id) and needs_block(seq, ledger):
            masters = masters or _masters(left, ledger)
            rank = choose_growth_rank(
                ranks,
                ledger.blocks_by_rank(seq.seq_id),
                ledger.free_by_rank(),
                masters,
                stay_whole=seq.num_tokens < config.long_tokens,
            )
            if rank is None:
                victim = _victim(seq, left, ranks, ledger)
                left.remove(victim)
                ledger.free(victim.seq_id)
                growth.preempted.append(victim)
                masters = []
            else:
                masters[rank] += 1
                growth.new_extents[seq.seq_id] = (ledger.append(seq.seq_id, rank),)
    return growth


def _masters(holding: Seq[Sequence], ledger: Ledger) -> list[int]:
    """Sequences each rank decodes in this plan (index = rank), of those that have a block."""
    masters = [0] * ledger.num_ranks
    for seq in holding:
        if not needs_block(seq, ledger):
            masters[ledger.last_rank(seq.seq_id)] += 1
    return masters


def _victim(
    seq: Sequence, holding: Seq[Sequence], ranks: tuple[int, ...], ledger: Ledger
) -> Sequence:
    """Who yields a page of `ranks` to `seq`: the last one that has any, or `seq` itself.

    It does not come before `seq`, so it was given no block in this plan.
    """
    for other in reversed(holding):
        blocks = ledger.blocks_by_rank(other.seq_id)
        if other is seq or any(blocks[rank] for rank in ranks):
            return other
    raise AssertionError(f"sequence {seq.seq_id} holds no KV")
