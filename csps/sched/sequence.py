"""Counters of one request while it is scheduled."""

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from csps.core.attention import DENSE, AttentionKind, AttentionParams
from csps.core.plan import SampledToken
from csps.core.request import FinishReason, SamplingParams
from csps.sched.placement import Stages


class SequenceStatus(StrEnum):
    WAITING = "waiting"  # holds no KV
    PREFILLING = "prefilling"  # holds the blocks of all its tokens, some not computed
    RUNNING = "running"  # all tokens but the newest are computed
    FINISHED = "finished"  # holds no KV, will not be planned again


@dataclass(slots=True, eq=False)
class Sequence:
    """One request: its tokens and how far they are computed. Blocks are the ledger's.

    The caller sets the first five fields; the scheduler owns the others. `max_new_tokens`
    starts as sampling.max_tokens and is lowered to the context length by the scheduler.
    `arrival`: the scheduler's virtual time then, no two alike. `num_computed`: tokens whose
    KV is in the pages; `num_planned`: those and what the `in_flight` steps under way compute.
    `closing`: it ends when no step has it any more. `stages`: prefill steps not yet planned,
    where they were fixed in advance. `expected_cached`: tokens of a waiting sequence that the
    prefix cache had when last looked; `looked_at`: the ledger's `num_published` then.
    `num_cached`: those it had when the sequence first started, None before.
    """

    seq_id: int
    prompt_ids: Seq[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_ids: frozenset[int] = frozenset()
    attention: AttentionParams = DENSE
    output_ids: list[int] = field(default_factory=list)
    max_new_tokens: int | None = None
    arrival: int = -1
    num_computed: int = 0
    num_planned: int = 0
    status: SequenceStatus = SequenceStatus.WAITING
    in_flight: int = 0
    closing: bool = False
    stages: Stages = ()
    expected_cached: int = 0
    looked_at: int = 0
    num_cached: int | None = None
    stop_ids: frozenset[int] = frozenset()
    # How KV that it may read was computed, preferred first; the last is its own way.
    salts: tuple[str, ...] = field(init=False)
    _ids: "array[int]" = field(init=False, repr=False)  # prompt and output

    def __post_init__(self) -> None:
        assert self.prompt_ids, "a prompt has at least one token"
        self.max_new_tokens = self.sampling.max_tokens
        self.stop_ids = frozenset(self.sampling.stop_token_ids)
        if not self.sampling.ignore_eos:
            self.stop_ids |= self.eos_ids
        self.salts = _salts(self.attention)
        self._ids = array("I", self.prompt_ids)
        self._ids.extend(self.output_ids)

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    @property
    def num_left(self) -> int:
        """Tokens to prefill: of a waiting sequence those it does not expect to find cached."""
        return self.num_tokens - (self.num_computed or self.expected_cached)

    def token_ids(self, start: int, stop: int) -> "array[int]":
        """Prompt and output tokens at positions [start, stop), of type code I."""
        return self._ids[start:stop]

    def sampling_from_here(self) -> SamplingParams:
        """What a rank that starts (or restarts) this sequence is told.

        min_tokens counts from the restart on: the ranks forgot the tokens before it.
        """
        if not self.output_ids:
            return self.sampling
        left = max(self.sampling.min_tokens - len(self.output_ids), 0)
        return replace(self.sampling, min_tokens=left)

    def append(self, token_id: int) -> FinishReason | None:
        """Take a sampled token; why the sequence ends with it, or None.

        A stop token ends it unless fewer than min_tokens tokens are out (the sampler masks
        stop tokens until then).
        """
        self.output_ids.append(token_id)
        self._ids.append(token_id)
        num_output = len(self.output_ids)
        if token_id in self.stop_ids and num_output >= self.sampling.min_tokens:
            return FinishReason.STOP
        if self.max_new_tokens is not None and num_output >= self.max_new_tokens:
            return FinishReason.LENGTH
        return None


def _salts(params: AttentionParams) -> tuple[str, ...]:
    """Whoever asked for a share gamma reads exact KV and what kept that share, no less."""
    if params.kind is AttentionKind.DENSE:
        return (params.kind.value,)
    # Rounded, because clients send gamma in single precision.
    detail = f"{params.gamma:.6g}" if params.kind is AttentionKind.CSA else params.window_blocks
    return (AttentionKind.DENSE.value, f"{params.kind} {detail}")


class TokenEvent(NamedTuple):
    """A token to hand to the client; `finish` says why it is the last one, if it is."""

    seq: Sequence
    token: SampledToken
    finish: FinishReason | None
