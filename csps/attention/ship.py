"""Queries travel to the KV and partial outputs come back: what decode and pass-Q share.

Suffixes: T rows, N rows asked for here, M shipped rows, H query heads, D head dim, B bytes.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends import Merge
from csps.attention.merge import packed_row_bytes, unpack
from csps.attention.messages import by_peer
from csps.parallel.collectives import SequenceComm
from csps.parallel.upload import upload

Fill = Callable[[Tensor, Tensor], None]  # fills o [.., H, D] and lse [.., H] fp32


class QueryExchange:
    """The rows of one step whose queries travel; the same in every layer."""

    def __init__(
        self,
        comm: SequenceComm,
        merge: Merge,
        *,
        shipped: Mapping[int, np.ndarray],
        num_asked: Mapping[int, int],
        num_rows: int,
        device: torch.device,
    ) -> None:
        """`shipped[p]`: rows that rank p has keys for, int64; `num_asked[p]`: rows it ships here.

        Row numbers are below `num_rows`.
        """
        self._comm = comm
        self._num_asked = num_asked
        self._num_shipped = {peer: len(rows) for peer, rows in shipped.items()}
        rows_M = np.concatenate([np.empty(0, np.int64), *shipped.values()])
        (self._rows_M,) = upload([rows_M], device)
        self._merge = merge(list(shipped.values()), num_rows, device)

    def __call__(
        self, q_THD: Tensor, attend_here: Fill, answer: Callable[[Tensor, Tensor, Tensor], None]
    ) -> Tensor:
        """o [T, H, D] in q's dtype: rows attended here, merged with what the peers answer.

        `attend_here(o fp32, lse)`: all rows over the keys here, while queries travel.
        `answer(q [N, H, D], o in q's dtype, lse)`: the peers' rows, in the order of `num_asked`,
        over the keys here. Collective over the ranks that ship to each other.
        """
        num_heads, head_dim = q_THD.shape[1:]
        asked_NHD = q_THD.new_empty(sum(self._num_asked.values()), num_heads, head_dim)
        queries = self._comm.exchange(
            "query",
            by_peer(q_THD[self._rows_M], self._num_shipped),
            by_peer(asked_NHD, self._num_asked),
        )
        o_THD = torch.empty(q_THD.shape, dtype=torch.float32, device=q_THD.device)
        lse_TH = o_THD.new_empty(o_THD.shape[:2])
        attend_here(o_THD, lse_TH)
        queries.wait()
        # Partial outputs travel in the model's dtype.
        row_bytes = packed_row_bytes(num_heads, head_dim, q_THD.element_size())
        answers_NB = q_THD.new_empty(len(asked_NHD), row_bytes, dtype=torch.uint8)
        answer(asked_NHD, *unpack(answers_NB, num_heads, head_dim, q_THD.dtype))
        replies_MB = q_THD.new_empty(len(self._rows_M), row_bytes, dtype=torch.uint8)
        self._comm.exchange(
            "partial",
            by_peer(answers_NB, self._num_asked),
            by_peer(replies_MB, self._num_shipped),
        ).wait()
        out_THD = q_THD.new_empty(q_THD.shape)
        self._merge(replies_MB, out_THD, (o_THD, lse_TH))
        return out_THD
