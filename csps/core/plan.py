"""What the scheduler decides and the ranks obey: one StepPlan per step of a lane.

There is no prefill request and no decode request, only how many tokens of each
sequence the next step computes. Ranks keep per-sequence state (extents, sampling);
a plan carries only what is new since the sequence's last plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from csps.core.attention import DENSE, AttentionParams, SparseReport
from csps.core.request import SamplingParams
from csps.core.shards import Extent, Slice


class Lane(StrEnum):
    """Steps of one lane run in order; lanes of one server run side by side."""

    PREFILL = "prefill"  # prompts
    DECODE = "decode"  # one token of each running sequence
    MIXED = "mixed"  # both in one step


class Layout(StrEnum):
    """How the linear layers of one step are split over the sp x tp ranks."""

    SP = "sp"  # tokens over sp, weights over tp
    TP = "tp"  # every rank has all tokens, weights over all sp * tp


class Targets(NamedTuple):
    """Tokens at [start, start + len(token_ids)), each to be scored by the row before it."""

    start: int
    token_ids: Sequence[int]


class Work(NamedTuple):
    """Tokens of one sequence that a step computes. A tuple: a server makes one for each token.

    `slices` cover [start, start + len(token_ids)) in position order. `new_extents` are
    the blocks allocated since the sequence's last plan. `sampling` stands in the first
    plan of a sequence only (a sequence that is recomputed starts again). `sample`: the
    rank that computes the last position draws the next token. `attention`: how a prefill
    attends; decode is always exact. `targets`: prompt tokens whose log-probability is wanted;
    they lie in [start + 1, stop + 1). `pending`: the one token is that which the lane's step
    before draws; the ranks know it by then, whoever planned this step did not.
    """

    seq_id: int
    start: int
    token_ids: Sequence[int]
    slices: tuple[Slice, ...]
    new_extents: tuple[Extent, ...] = ()
    sample: bool = False
    sampling: SamplingParams | None = None
    attention: AttentionParams = DENSE
    targets: Targets | None = None
    pending: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of one lane, the same on every rank. `step_id` grows by 1 within a lane."""

    lane: Lane
    step_id: int
    work: tuple[Work, ...]
    layout: Layout = Layout.SP

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.work)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One drawn token. Log-probabilities are natural, of the untempered distribution.

    `top_ids` / `top_logprobs`: the likeliest tokens, likeliest first, as many as asked for.
    """

    seq_id: int
    token_id: int
    logprob: float | None = None
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Natural log-probabilities of the tokens at [start, start + len(logprobs)).

    Each is given all tokens before it, under the untempered distribution.
    """

    seq_id: int
    start: int
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StepStats:
    """Where one rank's step went. Times in seconds, bytes of this rank by kind.

    comm_s is the time in which a transfer of this rank was under way; exposed_comm_s the
    part of it in which the rank had nothing else to do; compute_s = wall_s - exposed_comm_s.
    """

    wall_s: float = 0.0
    compute_s: float = 0.0
    comm_s: float = 0.0
    exposed_comm_s: float = 0.0
    bytes_sent: dict[str, int] = field(default_factory=dict)
    bytes_received: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepResult:
    """One rank's report that it finished a step."""

    rank: int
    lane: Lane
    step_id: int
    sampled: tuple[SampledToken, ...] = ()
    stats: StepStats = field(default_factory=StepStats)
    sparse: tuple[SparseReport, ...] = ()
    scored: tuple[ScoredTokens, ...] = ()
