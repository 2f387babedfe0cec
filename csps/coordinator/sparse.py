"""What sparse prefills approximated: the ranks' reports, pooled per request and since start."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from csps.core.attention import CONFIDENCE_Z, HeadReport, SparseReport
from csps.rpc.convert_attention import head_to_proto
from csps.v1 import generation_pb2 as pb


@dataclass(slots=True)
class SparseSummary:
    """Sums over ranks, steps, layers and KV heads. `heads` stay only if `keep_heads`."""

    keep_heads: bool = False
    kept_pairs: int = 0
    causal_pairs: int = 0
    fetched_blocks: int = 0
    remote_blocks: int = 0
    num_heads: int = 0
    num_dense: int = 0
    num_widened: int = 0
    num_probes: int = 0
    recall_sum: float = 0.0
    recall_sum_var: float = 0.0  # variance of recall_sum
    recall_p5: float = 1.0
    recall_min: float = 1.0
    heads: list[HeadReport] = field(default_factory=list)

    def add(self, reports: Iterable[SparseReport], gamma: float) -> None:
        """One step's reports of one sequence, whose request asked for `gamma`."""
        for report in reports:
            self.kept_pairs += report.kept_pairs
            self.causal_pairs += report.causal_pairs
            self.fetched_blocks += report.fetched_blocks
            self.remote_blocks += report.remote_blocks
            self.recall_p5 = min(self.recall_p5, report.recall_p5)
            for head in report.heads:
                self._add_head(head, gamma)

    def _add_head(self, head: HeadReport, gamma: float) -> None:
        self.num_heads += 1
        if gamma < 1.0:
            # A float came back from the ranks: "wider than asked" must not mean rounding.
            self.num_dense += head.gamma >= 1.0
            self.num_widened += gamma + 1e-6 < head.gamma < 1.0
        self.num_probes += head.num_probes
        self.recall_sum += head.num_probes * head.recall_mean
        self.recall_sum_var += head.num_probes**2 * head.recall_var
        self.recall_min = min(self.recall_min, head.recall_min)
        if self.keep_heads:
            self.heads.append(head)

    def merge(self, other: "SparseSummary") -> None:
        """Pool another request's summary."""
        for name in (
            "kept_pairs", "causal_pairs", "fetched_blocks", "remote_blocks", "num_heads",
            "num_dense", "num_widened", "num_probes", "recall_sum", "recall_sum_var",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.recall_p5 = min(self.recall_p5, other.recall_p5)
        self.recall_min = min(self.recall_min, other.recall_min)

    def to_proto(self) -> pb.AttentionReport:
        """All but `kind` and `gamma`."""
        mean = self.recall_sum / self.num_probes if self.num_probes else 1.0
        spread = CONFIDENCE_Z * math.sqrt(self.recall_sum_var) / max(self.num_probes, 1)
        return pb.AttentionReport(
            density=_share(self.kept_pairs, self.causal_pairs),
            union_density=_share(self.fetched_blocks, self.remote_blocks),
            recall_mean=mean,
            recall_low=max(mean - spread, 0.0),
            recall_high=min(mean + spread, 1.0),
            recall_p5=self.recall_p5,
            recall_min=self.recall_min,
            num_probes=self.num_probes,
            dense_share=_share(self.num_dense, self.num_heads),
            widened_share=_share(self.num_widened, self.num_heads),
            heads=[head_to_proto(head) for head in self.heads],
        )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
