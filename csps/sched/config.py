"""Limits a scheduler works within."""

from dataclasses import dataclass, fields

from csps.core.plan import Lane


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Sizes of the KV cache and of the steps.

    `pages_per_rank` pages of `block_size` tokens hold KV on each of `num_ranks` ranks.
    `max_running`: sequences that hold KV at a time. `max_waiting_tokens`: queued tokens
    above which `add` refuses. `max_model_len`: prompt and output of one sequence, in
    tokens. `retry_after_s`: what a refused client is told to wait, in seconds.
    `prefix_cache`: sequences read the KV of blocks that others computed.

    Of DisaggScheduler alone: `stage_tokens`, new tokens of one prefill step; a long prompt
    is cut into stages of it. `long_tokens`: sequences of at least this many tokens are
    split over the ranks, shorter ones stay whole on one. `ageing`: how fast waiting makes
    up for length, in tokens of remaining prefill per prompt token planned meanwhile. Nothing
    that comes after 1 / ageing times a prompt's length overtakes it: with 0.5 twice its
    length, near 0 is shortest first, very large is first come first served.
    `prefill_ranks` compute prompts, `decode_ranks` hold the blocks that decode fills; all
    ranks if empty.

    Of ChunkedScheduler alone: `token_budget`, new tokens of one step, decoded ones included.
    """

    num_ranks: int
    block_size: int
    pages_per_rank: int
    max_running: int
    max_waiting_tokens: int
    max_model_len: int
    retry_after_s: float = 5.0
    stage_tokens: int = 4096
    long_tokens: int = 512
    ageing: float = 0.5
    prefill_ranks: tuple[int, ...] = ()
    decode_ranks: tuple[int, ...] = ()
    token_budget: int = 512
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, tuple):
                known = set(value) & set(range(self.num_ranks))
                assert sorted(value) == sorted(known), f"{item.name}: {value}"
            elif not isinstance(value, bool):
                assert value > 0, f"{item.name} must be positive, got {value}"

    def ranks(self, lane: Lane) -> tuple[int, ...]:
        """Ranks on which the lane takes pages."""
        chosen: tuple[int, ...] = ()
        if lane is Lane.PREFILL:
            chosen = self.prefill_ranks
        elif lane is Lane.DECODE:
            chosen = self.decode_ranks
        return chosen or tuple(range(self.num_ranks))

    def pages(self, lane: Lane) -> int:
        """Pages of the lane's ranks."""
        return len(self.ranks(lane)) * self.pages_per_rank

    @property
    def total_pages(self) -> int:
        return self.num_ranks * self.pages_per_rank

    @property
    def kv_tokens(self) -> int:
        """Tokens of the longest sequence that fits.

        Output counts as the prompt does: after a preemption the ranks that compute prompts
        compute both.
        """
        return self.pages(Lane.PREFILL) * self.block_size

    @property
    def watermark_pages(self) -> int:
        """Pages that admission leaves free on decode ranks, for running sequences: 1%.

        Source: Sarathi-Serve (OSDI'24), the watermark of its block manager.
        """
        return -(-self.pages(Lane.DECODE) // 100)
