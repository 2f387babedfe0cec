"""How a prompt's prefill attends: exactly, or over the KV blocks that matter.

A *tile* is the queries of one KV block's positions; a *pair* is one (query tile, KV block)
that causality lets see each other. Sparse attention keeps some of the pairs, per layer and KV
head. *Recall* is the share of a query row's exact attention mass that lies in kept blocks.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from csps.core.errors import ConfigError, InvalidRequestError

MAX_WINDOW_BLOCKS = 65_536
# Two-sided 95% of the normal distribution.
CONFIDENCE_Z = 1.96


class AttentionKind(StrEnum):
    """Which pairs of a prompt's prefill are computed."""

    DENSE = "dense"  # all
    CSA = "csa"  # those that hold a share gamma of the attention mass
    CSA_DISTANCE = "csa-distance"  # the near ones, and fewer the farther (CSPS paper's rule)


class Wire(StrEnum):
    """Type of keys and values that sparse prefill fetches from other ranks."""

    MODEL = "model"  # the model's own
    INT8 = "int8"  # with one scale per token and head


class Estimate(StrEnum):
    """What the mass of a block is estimated from."""

    ROWS = "rows"  # sampled query rows meet all keys
    MEANS = "means"  # all query rows meet mean keys


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """What a request may choose.

    `gamma`: share of attention mass that `csa` keeps, by estimate; 1 keeps everything.
    `window_blocks`: blocks `csa-distance` keeps whole behind a query. `seed` decides which
    rows probe the recall; the coordinator derives it from the prompt.
    """

    kind: AttentionKind = AttentionKind.DENSE
    gamma: float = 0.95
    window_blocks: int = 8
    seed: int = 0

    def validate(self) -> None:
        """Raise InvalidRequestError naming the first field out of its limits."""
        if not 0.0 < self.gamma <= 1.0:  # NaN fails too
            raise InvalidRequestError("attention.gamma", f"must be in (0, 1], got {self.gamma}")
        if not 1 <= self.window_blocks <= MAX_WINDOW_BLOCKS:
            raise InvalidRequestError(
                "attention.window_blocks",
                f"must be in [1, {MAX_WINDOW_BLOCKS}], got {self.window_blocks}",
            )

    @property
    def is_sparse(self) -> bool:
        return self.kind is not AttentionKind.DENSE


DENSE = AttentionParams()


@dataclass(frozen=True, slots=True)
class CsaConfig:
    """What all sparse prefills of a server share; every rank must agree on it.

    `min_recall`: a KV head whose measured recall may be below it widens gamma once, then runs
    dense in that layer. So does one of whose rows more than 5% recall less than `min_recall_p5`:
    its mean hides rare rows with sharp matches, and those are what copying is made of.
    `max_density`: one that would keep a larger share of the pairs runs dense too.
    `rows_per_tile`: query rows per query head and tile that choose. `pipeline`: communication
    runs beside computation; off only to show what that is worth.
    """

    min_recall: float = 0.90
    min_recall_p5: float = 0.75
    max_density: float = 0.7
    rows_per_tile: int = 8
    estimate: Estimate = Estimate.ROWS
    wire: Wire = Wire.MODEL
    pipeline: bool = True

    def validate(self) -> None:
        """Raise ConfigError naming the first flag out of its limits."""
        if not 0.0 <= self.min_recall <= 1.0:
            raise ConfigError(f"--csa-min-recall: must be in [0, 1], got {self.min_recall}")
        if not 0.0 <= self.min_recall_p5 <= 1.0:
            raise ConfigError(f"--csa-min-recall-p5: must be in [0, 1], got {self.min_recall_p5}")
        if not 0.0 < self.max_density <= 1.0:
            raise ConfigError(f"--csa-max-density: must be in (0, 1], got {self.max_density}")
        if not 1 <= self.rows_per_tile <= 64:
            raise ConfigError(f"--csa-rows: must be in [1, 64], got {self.rows_per_tile}")


@dataclass(frozen=True, slots=True)
class HeadReport:
    """One layer and KV head of a sparse prefill step.

    `gamma`: what it ran with in the end (1: dense). `density`: kept pairs / causal pairs, of
    all ranks. Recall is that of the pairs kept in the end, over the `num_probes` rows that
    measured it; `recall_var` is the variance of its mean's estimate.
    """

    layer: int
    head: int
    gamma: float
    density: float
    num_probes: int
    recall_mean: float
    recall_var: float
    recall_p5: float
    recall_min: float

    @property
    def recall_low(self) -> float:
        """Lower end of the 95% interval of the mean."""
        return max(self.recall_mean - self._spread, 0.0)

    @property
    def recall_high(self) -> float:
        """Upper end of the 95% interval of the mean."""
        return min(self.recall_mean + self._spread, 1.0)

    @property
    def _spread(self) -> float:
        # Student's t, as the variance is estimated too: its expansion in 1 / degrees of freedom.
        z, freedom = CONFIDENCE_Z, max(self.num_probes - 1, 1)
        t = z + (z**3 + z) / (4 * freedom)
        t += (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        return t * math.sqrt(self.recall_var)


@dataclass(frozen=True, slots=True)
class SparseReport:
    """What one rank did in one step for one sequence that is prefilled sparsely.

    Pairs and blocks are summed over layers and KV heads. `fetched_blocks` of the
    `remote_blocks` that lie on other ranks crossed the network. `recall_p5` is over all
    probes of the step. `heads` stands in the report of the first rank of each tensor column.
    """

    seq_id: int
    kept_pairs: int
    causal_pairs: int
    fetched_blocks: int
    remote_blocks: int
    recall_p5: float
    heads: tuple[HeadReport, ...] = ()
