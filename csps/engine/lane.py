"""What one lane of a rank runs with: views of the weights by layout, and its traffic."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from csps.core.plan import Layout
from csps.model.llama import Llama
from csps.parallel.collectives import SequenceComm, TensorComm
from csps.parallel.overlap import CommClock


@dataclass(slots=True)
class LayoutEngine:
    """Runs the linear layers of steps in one layout, together with the ranks of `comm`.

    `model` is a view of this rank's part of the weights. Suffixes: N rows, E hidden size,
    V vocabulary.
    """

    model: Llama
    comm: TensorComm

    def logits(self, hidden_NE: Tensor) -> Tensor | None:
        """fp32 [N, V] on the first rank of `comm`, None on the others; collective.

        Each rank multiplies with its range of the vocabulary (csps.model.shard).
        """
        part_NV = self.model.logits(hidden_NE)
        vocab_size = self.model.config.vocab_size
        missing = -(-vocab_size // self.comm.size) - part_NV.shape[1]
        if missing:
            part_NV = F.pad(part_NV, (0, missing))
        logits_NV = self.comm.gather_columns(part_NV)
        return None if logits_NV is None else logits_NV[:, :vocab_size]


@dataclass(slots=True)
class LaneEngine:
    """One lane. `sequence`: its traffic along the sequence axis."""

    layouts: Mapping[Layout, LayoutEngine]
    sequence: SequenceComm
    clock: CommClock
