"""Whether what a schedule says of its sequences agrees with its plans and with the ledger."""

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

from csps.core.plan import StepPlan
from csps.core.shards import num_blocks
from csps.sched.config import SchedulerConfig
from csps.sched.ledger import Ledger
from csps.sched.sequence import Sequence, SequenceStatus


def check_lists(
    sequences: Mapping[int, Sequence],
    lists: Mapping[SequenceStatus, Seq[Sequence]],
    waiting_tokens: int,
) -> None:
    """AssertionError unless every live sequence is in the list of its status, once, in order.

    `sequences`: all live ones by seq_id; `waiting_tokens`: those counted of the waiting.
    """
    listed = sorted(seq.seq_id for members in lists.values() for seq in members)
    assert listed == sorted(sequences), "a live sequence is not in exactly one list"
    queued = sum(seq.num_tokens for seq in lists[SequenceStatus.WAITING])
    assert queued == waiting_tokens, f"{queued} tokens wait, not {waiting_tokens}"
    for status, members in lists.items():
        arrivals = [seq.arrival for seq in members]
        assert arrivals == sorted(arrivals), f"{status} out of order"
        for seq in members:
            assert seq.status is status, f"sequence {seq.seq_id}: {seq.status}, not {status}"


def check_in_flight(sequences: Iterable[Sequence], plans: Iterable[StepPlan]) -> None:
    """AssertionError unless each live sequence counts the plans in flight that have it."""
    planned = Counter(item.seq_id for plan in plans for item in plan.work)
    flying = {seq.seq_id: seq.in_flight for seq in sequences if seq.in_flight}
    assert planned == flying, f"planned {planned}, marked {flying}"


def check_kv(holding: Seq[Sequence], ledger: Ledger, config: SchedulerConfig) -> None:
    """AssertionError unless `holding`, and nobody else, have the blocks they need, no more."""
    ledger.check_integrity(seq.seq_id for seq in holding)
    assert len(holding) <= config.max_running, "more sequences hold KV than allowed"
    for seq in holding:
        # A decode step in flight has the block of its token already.
        decoding = seq.status is SequenceStatus.RUNNING
        tokens = seq.num_planned if decoding else seq.num_tokens
        held = ledger.num_blocks(seq.seq_id)
        want = num_blocks(tokens, config.block_size)
        assert held == want, f"sequence {seq.seq_id} holds {held} blocks, needs {want}"
