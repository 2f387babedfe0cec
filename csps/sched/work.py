"""Builds what a plan says about one sequence."""

from csps.core.plan import Targets, Work
from csps.core.shards import Extent, Slice
from csps.sched.sequence import Sequence


def prefill_work(
    seq: Sequence, slices: tuple[Slice, ...], new_extents: tuple[Extent, ...] = ()
) -> Work:
    """Compute `slices`, which follow each other; draw a token if they reach the end.

    `new_extents`: all blocks of the sequence, where this is its first step.
    """
    start, stop = slices[0].start, slices[-1].stop
    return Work(
        seq_id=seq.seq_id,
        start=start,
        token_ids=seq.token_ids(start, stop),
        slices=slices,
        new_extents=new_extents,
        sample=stop == seq.num_tokens,
        sampling=seq.sampling_from_here() if new_extents else None,
        attention=seq.attention,
        targets=_targets(seq, start, stop),
    )


def _targets(seq: Sequence, start: int, stop: int) -> Targets | None:
    """Prompt tokens that rows [start, stop) score. A prompt is scored once: there is no output
    before all of it has been, and what is recomputed later has some.
    """
    num_wanted = seq.sampling.prompt_logprobs
    if not num_wanted or seq.output_ids:
        return None
    num_prompt = len(seq.prompt_ids)
    first = max(num_prompt - num_wanted, start + 1)
    behind = min(num_prompt, stop + 1)
    return Targets(first, seq.prompt_ids[first:behind]) if first < behind else None


def decode_work(seq: Sequence, master: int, new_extents: tuple[Extent, ...] = ()) -> Work:
    """Compute the newest token on rank `master`, which owns its block, and draw the next.

    While a step is under way that draws the newest, nobody knows it yet.
    """
    at = seq.num_planned
    slices = (Slice(master, at, at + 1),)
    # By position: every token of a server comes through here.
    if seq.in_flight:
        return Work(seq.seq_id, at, (0,), slices, new_extents, True, pending=True)
    return Work(seq.seq_id, at, (seq.output_ids[-1],), slices, new_extents, True)
