"""Block-sparse prefill of a long prompt in one layer, beside the best dense kernel.

Suffixes: K KV heads, N tiles, G query heads of a KV head, B tokens of a tile, D head dim, I items
(a KV head and a tile), R = G * B rows.
"""

import functools
from collections.abc import Callable

from torch import Tensor

from csps.attention.backends import PageLists
from csps.attention.backends.triton import KERNELS
from csps.attention.merge import merge_into
from scripts.bench_gpu import dense, patterns
from scripts.bench_gpu.bench import Bench, Row

REPEATS = 10


def run(bench: Bench) -> None:
    """Rows of the dense kernels, then of each density: the kernel alone, and all of attention."""
    heads = dense.random_heads(bench, bench.sizes.long)
    dense.measure(bench, heads, dense.ALL)
    tiled = Tiled(heads, bench.sizes.page_size)
    bench.timed(
        "diagonals",
        tiled.diagonal,
        flops=4.0 * tiled.q_IGBD.numel() * (bench.sizes.page_size + 1) / 2,
        num_bytes=sum(x.nbytes for x in heads) + tiled.q_IGBD.nbytes,
    )
    for density in bench.sizes.densities:
        _density(bench, tiled, density)


class Tiled:
    """A sequence's heads as items and pages, block j of KV head k being page k * J + j."""

    def __init__(self, heads: dense.Heads, size: int) -> None:
        group = len(heads.q_HTD) // len(heads.k_KTD)
        q_KGNBD = heads.q_HTD.unflatten(0, (-1, group)).unflatten(2, (-1, size))
        self.q_IGBD = q_KGNBD.transpose(1, 2).flatten(0, 1).contiguous()
        self.k_IBD, self.v_IBD = (x.unflatten(1, (-1, size)).flatten(0, 1) for x in heads[1:])

    def diagonal(self) -> tuple[Tensor, Tensor]:
        """Every tile over its own tokens."""
        return KERNELS.diagonal(self.q_IGBD, self.k_IBD, self.v_IBD)

    def pages(self, lists: PageLists) -> tuple[Tensor, Tensor]:
        """Every tile over its list, which the diagonal is not in."""
        return KERNELS.block_sparse(self.q_IGBD.flatten(1, 2), self.k_IBD, self.v_IBD, lists)

    def attention(self, lists: PageLists) -> Tensor:
        """Both, merged: all that one layer attends, as csps.attention.sparse_layer does."""
        o_IGBD, lse_IGB = self.diagonal()
        o_IRD, lse_IR = self.pages(lists)
        acc_IRD = o_IGBD.float().flatten(1, 2)
        merge_into(acc_IRD, lse_IGB.flatten(1, 2).contiguous(), o_IRD, lse_IR)
        return acc_IRD.to(self.q_IGBD.dtype)


def _density(bench: Bench, tiled: Tiled, density: float) -> None:
    keep_KNJ = patterns.scattered(bench, bench.sizes.long // bench.sizes.page_size, density)
    kept = int(keep_KNJ.sum())
    causal_pairs = keep_KNJ.shape[0] * keep_KNJ.shape[1] * (keep_KNJ.shape[1] + 1) // 2
    keep_KNJ.diagonal(dim1=1, dim2=2).fill_(False)
    lists = patterns.page_lists(keep_KNJ)
    del keep_KNJ
    # Of each page two products with all rows; attention beside them has its diagonals.
    flops = 4.0 * len(lists.pages) * tiled.q_IGBD[0].numel() * bench.sizes.page_size
    for label, work, of_this in (("pages", tiled.pages, flops), ("attention", tiled.attention, 0)):
        bench.case(
            f"density {density:g}: {label}",
            functools.partial(
                _row, bench, tiled, functools.partial(work, lists), of_this, kept / causal_pairs
            ),
        )


def _row(
    bench: Bench, tiled: Tiled, work: Callable[[], object], flops: float, density: float
) -> Row:
    timing = bench.timer(work, REPEATS)
    least_bytes = 2 * tiled.q_IGBD.nbytes + tiled.k_IBD.nbytes + tiled.v_IBD.nbytes
    row = bench.beside_floor(timing, flops, least_bytes)
    peer = dense.peer_s(bench)
    return {**row, "density": density, "over_dense": timing.median_s / peer if peer else None}
