"""Block-sparse attention through torch's fused CPU kernel, on pages gathered per item.

One call per item reaches the dense kernel's speed, so attention costs about its density.
Suffixes: I items, R rows, P pages, B tokens of a page, D head dim, L gathered tokens.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends import PageLists

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class BlockSparseCpu:
    """See `BlockSparse`. `upcast`: the CPU has no bf16 arithmetic of its own.

    Items are shared out to `num_threads` threads: rows of one item are too few for them.
    """

    def __init__(self, *, upcast: bool, num_threads: int) -> None:
        self._upcast = upcast
        self._num_threads = num_threads
        self._pool = (
            ThreadPoolExecutor(num_threads, "block-sparse", initializer=_use_one_thread)
            if num_threads > 1
            else None
        )

    def __call__(
        self, q_IRD: Tensor, k_PBD: Tensor, v_PBD: Tensor, lists: PageLists
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float32 if self._upcast else q_IRD.dtype
        o_IRD = torch.zeros(q_IRD.shape, dtype=dtype)
        lse_IR = torch.full(q_IRD.shape[:2], -torch.inf)
        if not len(lists.pages):
            return o_IRD, lse_IR
        # Only pages that some item wants are converted, and each once.
        wanted, pages = np.unique(lists.pages.numpy(), return_inverse=True)
        index = torch.from_numpy(wanted)
        k_PBD, v_PBD = (x.index_select(0, index).to(dtype) for x in (k_PBD, v_PBD))
        starts = lists.starts.numpy()
        shares = _shares(starts, self._num_threads)
        if self._pool is None or len(shares) == 1:
            for share in shares:
                _attend(share, q_IRD, k_PBD, v_PBD, starts, pages, o_IRD, lse_IR)
        else:
            runs = [
                self._pool.submit(_attend, share, q_IRD, k_PBD, v_PBD, starts, pages, o_IRD, lse_IR)
                for share in shares
            ]
            for run in runs:
                run.result()
        return o_IRD, lse_IR


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def _shares(starts: np.ndarray, num_shares: int) -> list[range]:
    """Ranges of items with about as many pages each."""
    cuts = np.searchsorted(starts, np.linspace(0, starts[-1], num_shares + 1)[1:-1])
    edges = [0, *cuts.tolist(), len(starts) - 1]
    return [range(a, b) for a, b in itertools.pairwise(edges) if b > a]


@torch.inference_mode()  # thread-local, and this may run in the pool
def _attend(
    items: range,
    q_IRD: Tensor,
    k_PBD: Tensor,
    v_PBD: Tensor,
    starts: np.ndarray,
    all_pages: np.ndarray,
    o_IRD: Tensor,
    lse_IR: Tensor,
) -> None:
    """Fill o and lse of `items`. Pages that an item's list begins with like the last one's
    stay where they were gathered: a dense head gathers every page once."""
    longest = int(np.diff(starts)[items.start : items.stop].max(initial=0))
    _, size, dim = k_PBD.shape
    k_LD, v_LD = (k_PBD.new_empty(longest, size, dim) for _ in range(2))
    held = np.empty(0, dtype=np.int64)
    for item in items:
        pages = all_pages[starts[item] : starts[item + 1]]
        if not len(pages):
            continue
        kept = _common_prefix(held, pages)
        if kept < len(pages):
            index = torch.from_numpy(pages[kept:])
            torch.index_select(k_PBD, 0, index, out=k_LD[kept : len(pages)])
            torch.index_select(v_PBD, 0, index, out=v_LD[kept : len(pages)])
        held = pages
        q_11RD = q_IRD[item].to(k_PBD.dtype)[None, None]
        k_11LD, v_11LD = (x[: len(pages)].view(1, 1, -1, dim) for x in (k_LD, v_LD))
        o_11RD, lse_11R = _flash(q_11RD, k_11LD, v_11LD, 0.0, False)
        o_IRD[item], lse_IR[item] = o_11RD[0, 0], lse_11R[0, 0]


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
