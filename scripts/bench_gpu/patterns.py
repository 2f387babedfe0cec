"""Which blocks tiles keep, and data whose attention has such a pattern.

Suffixes: K KV heads, N tiles (as many as blocks), J blocks, G query heads of a KV head, T tokens, D
head dim.
"""

import math

import torch
from torch import Tensor

from csps.attention.backends import PageLists
from scripts.bench_gpu.bench import Bench
from scripts.bench_gpu.dense import Heads

# A key of a tile's own cluster is so many times likelier than another.
CLUSTER_WEIGHT = 2000.0


def scattered(bench: Bench, num_blocks: int, density: float) -> Tensor:
    """bool [K, N, J] on the device: the sink, the two nearest, and others at random.

    Of each tile's blocks, its own included, the share `density` is kept, and those three at least.
    """
    device = bench.device
    tiles_N1 = torch.arange(num_blocks, device=device)[:, None]
    blocks_J = torch.arange(num_blocks, device=device)
    visible_NJ = blocks_J <= tiles_N1
    forced_NJ = visible_NJ & ((blocks_J == 0) | (blocks_J >= tiles_N1 - 1))
    wanted_N1 = ((tiles_N1 + 1) * density).round().clamp_min(1)
    keep_KNJ = torch.empty(
        bench.sizes.model.num_kv_heads, num_blocks, num_blocks, dtype=torch.bool, device=device
    )
    for keep_NJ in keep_KNJ:
        lots_NJ = torch.rand(num_blocks, num_blocks, generator=bench.generator, device=device)
        lots_NJ = torch.where(forced_NJ, lots_NJ + 1.0, lots_NJ * visible_NJ)
        place_NJ = lots_NJ.argsort(dim=1, descending=True).argsort(dim=1)
        keep_NJ.copy_((place_NJ < wanted_N1) & visible_NJ | forced_NJ)
    return keep_KNJ


def page_lists(keep_KNJ: Tensor) -> PageLists:
    """Lists of items (head, tile), where block j of KV head k is page k * J + j."""
    num_blocks = keep_KNJ.shape[2]
    pages = torch.empty(int(keep_KNJ.sum()), dtype=torch.int32, device=keep_KNJ.device)
    at = 0
    for head, keep_NJ in enumerate(keep_KNJ):
        blocks = keep_NJ.nonzero()[:, 1] + head * num_blocks
        pages[at : at + len(blocks)] = blocks
        at += len(blocks)
    ends = keep_KNJ.sum(2).flatten().cumsum(0)
    starts = torch.cat((ends.new_zeros(1), ends)).int()
    return PageLists(starts, pages, num_blocks)


def planted(bench: Bench, num_tokens: int, num_clusters: int, page_size: int) -> Heads:
    """Random data whose tiles attend to one block in `num_clusters`, by content and not distance.

    A block and a tile belong to a cluster each; its direction is added to the keys and queries, as
    strongly as the weight of a cluster's keys wants.
    """
    model = bench.sizes.model
    dim, num_blocks = model.head_dim, num_tokens // page_size
    strength = math.sqrt(math.log(CLUSTER_WEIGHT) * math.sqrt(dim))
    directions_CD, _ = torch.linalg.qr(bench.normal(dim, num_clusters, dtype=torch.float32))
    directions_CD = (directions_CD.T * strength).to(bench.dtype)

    def of_clusters(heads: int) -> Tensor:
        shape = heads, num_blocks
        cluster = torch.randint(num_clusters, shape, generator=bench.generator, device=bench.device)
        return directions_CD[cluster].repeat_interleave(page_size, dim=1)

    kv_heads, group = model.num_kv_heads, model.group_size
    k_KTD = bench.normal(kv_heads, num_tokens, dim) + of_clusters(kv_heads)
    # A group's heads attend alike, as they do in trained models.
    q_KTD = of_clusters(kv_heads).repeat_interleave(group, dim=0)
    q_HTD = bench.normal(kv_heads * group, num_tokens, dim) + q_KTD
    return Heads(q_HTD, k_KTD, bench.normal(kv_heads, num_tokens, dim))
