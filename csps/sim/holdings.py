"""Where the KV of the sequences that decode lies, kept up to date plan by plan."""

from collections.abc import Iterable
from typing import NamedTuple

from csps.core.plan import StepPlan
from csps.sched.ledger import Ledger


class Spread(NamedTuple):
    """A decode step over the ranks of the sequence axis.

    `kv_share`: part of all keys that the busiest rank holds. `masters`: tokens that the busiest
    rank masters. `trips`: (token, other rank that holds keys of it) pairs. `remote_share`: part
    of the keys that is not on their token's master.
    """

    kv_share: float
    masters: int
    trips: int
    remote_share: float


class Holdings:
    """Blocks by rank of the sequences that have decoded and hold KV still."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._blocks: dict[int, list[int]] = {}
        self._totals = [0] * ledger.num_ranks
        self._trips = 0

    def drop(self, seq_ids: Iterable[int]) -> None:
        """They gave their blocks back."""
        for seq_id in seq_ids:
            blocks = self._blocks.pop(seq_id, None)
            if blocks is not None:
                self._count(blocks, -1)

    def spread(self, plan: StepPlan) -> Spread:
        """Of a decode step that has just been planned. All that decode are in it."""
        masters = [0] * self._ledger.num_ranks
        known = self._blocks
        at_master = 0
        for work in plan.work:
            master = work.slices[0].rank
            masters[master] += 1
            blocks = known.get(work.seq_id)
            if blocks is None:
                blocks = known[work.seq_id] = list(self._ledger.blocks_by_rank(work.seq_id))
                self._count(blocks, 1)
            else:
                for extent in work.new_extents:
                    self._trips += not blocks[extent.rank]
                    blocks[extent.rank] += extent.num_pages
                    self._totals[extent.rank] += extent.num_pages
            at_master += blocks[master]
        held = sum(self._totals)
        return Spread(
            kv_share=max(self._totals) / held,
            masters=max(masters),
            trips=self._trips,
            remote_share=1 - at_master / held,
        )

    def _count(self, blocks: list[int], sign: int) -> None:
        self._trips += sign * (sum(num > 0 for num in blocks) - 1)
        for rank, num in enumerate(blocks):
            self._totals[rank] += sign * num
