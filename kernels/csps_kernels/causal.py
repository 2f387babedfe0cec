"""Dense attention over contiguous keys with log-sum-exp, causal or not.

The query heads of a KV head are rows of one program, token by token, so that keys are read once
for all of them. Suffixes: N sequences, H query heads, K KV heads, T tokens, L keys, D head dim, S
parts of the keys, M rows of a program, C keys of a step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csps_kernels.online_softmax import add_block, base_2_scale, finish
from csps_kernels.parts import choose_parts, merge_parts
from csps_kernels.tiling import check_sizes, choose_tiling


@triton.jit
def _sweep(
    q_MD,
    k_ptr,
    v_ptr,
    acc_MD,
    max_M,
    sum_M,
    tokens_M,
    first,
    last,
    num_keys,
    k_stride,
    v_stride,
    scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Take keys first..last into (acc, max, sum), by steps of KEYS; see `_dense`."""
    keys_C = tl.arange(0, KEYS)
    dims_D = tl.arange(0, DIM)
    k_places_CD = keys_C[:, None] * k_stride + dims_D[None, :]
    v_places_CD = keys_C[:, None] * v_stride + dims_D[None, :]
    k_ptr += first.to(tl.int64) * k_stride
    v_ptr += first.to(tl.int64) * v_stride
    for start in tl.range(first, last, KEYS):
        if MASKED:
            held_C = start + keys_C < num_keys
            k_CD = tl.load(k_ptr + k_places_CD, mask=held_C[:, None], other=0.0)
            v_CD = tl.load(v_ptr + v_places_CD, mask=held_C[:, None], other=0.0)
        else:
            k_CD = tl.load(k_ptr + k_places_CD)
            v_CD = tl.load(v_ptr + v_places_CD)
        scores_MC = tl.dot(q_MD, tl.trans(k_CD), input_precision="tf32x3")
        if MASKED:
            seen_MC = held_C[None, :]
            if CAUSAL:
                seen_MC = seen_MC & (start + keys_C[None, :] <= tokens_M[:, None])
            scores_MC = tl.where(seen_MC, scores_MC, float("-inf"))
        acc_MD, max_M, sum_M = add_block(scores_MC, v_CD, acc_MD, max_M, sum_M, scale)
        k_ptr += KEYS * k_stride
        v_ptr += KEYS * v_stride
    return acc_MD, max_M, sum_M


# Integers that change from call to call must not each compile a kernel of their own.
@triton.jit(do_not_specialize=["num_tokens", "num_keys", "num_parts", "part_keys"])
def _dense(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    num_kv_heads,
    num_tokens,
    num_keys,
    num_parts,
    part_keys,
    scale,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program: ROWS rows of a KV head over one part of its keys.

    Strides are of (sequence, head, token), o's of (sequence, part, head, token); lse [N, S, H, T]
    is contiguous. A part is `part_keys` keys, a multiple of KEYS; with CAUSAL there is one part.
    """
    num_tiles = tl.cdiv(num_tokens * GROUP, ROWS)
    # Where causal, later rows see more keys: they go first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tile = program % num_tiles
    part = program // num_tiles % num_parts
    kv_head = program // num_tiles // num_parts % num_kv_heads
    seq = (program // num_tiles // num_parts // num_kv_heads).to(tl.int64)

    rows_M = tile * ROWS + tl.arange(0, ROWS)
    tokens_M = rows_M // GROUP
    heads_M = kv_head * GROUP + rows_M % GROUP
    inside_M = tokens_M < num_tokens
    dims_D = tl.arange(0, DIM)
    q_places_M = heads_M.to(tl.int64) * q_strides[1] + tokens_M.to(tl.int64) * q_strides[2]
    q_MD = tl.load(
        q_ptr + seq * q_strides[0] + q_places_M[:, None] + dims_D[None, :],
        mask=inside_M[:, None],
        other=0.0,
    )
    k_ptr += seq * k_strides[0] + kv_head.to(tl.int64) * k_strides[1]
    v_ptr += seq * v_strides[0] + kv_head.to(tl.int64) * v_strides[1]

    first = part * part_keys
    last = tl.minimum(first + part_keys, num_keys)
    unmasked = last
    if CAUSAL:
        last = tl.minimum(last, (tile * ROWS + ROWS - 1) // GROUP + 1)
        unmasked = tl.minimum(last, tile * ROWS // GROUP + 1)
    unmasked = unmasked // KEYS * KEYS
    acc_MD = tl.zeros([ROWS, DIM], tl.float32)
    max_M = tl.full([ROWS], float("-inf"), tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    acc_MD, max_M, sum_M = _sweep(
        q_MD, k_ptr, v_ptr, acc_MD, max_M, sum_M, tokens_M, first, unmasked, num_keys,
        k_strides[2], v_strides[2], scale, False, CAUSAL, DIM, KEYS,
    )  # fmt: skip
    acc_MD, max_M, sum_M = _sweep(
        q_MD, k_ptr, v_ptr, acc_MD, max_M, sum_M, tokens_M, unmasked, last, num_keys,
        k_strides[2], v_strides[2], scale, True, CAUSAL, DIM, KEYS,
    )  # fmt: skip

    o_MD, lse_M = finish(acc_MD, max_M, sum_M)
    o_places_M = heads_M.to(tl.int64) * o_strides[2] + tokens_M.to(tl.int64) * o_strides[3]
    tl.store(
        o_ptr + seq * o_strides[0] + part * o_strides[1] + o_places_M[:, None] + dims_D[None, :],
        o_MD.to(o_ptr.dtype.element_ty),
        mask=inside_M[:, None],
    )
    lse_rows_M = (seq * num_parts + part) * num_kv_heads * GROUP + heads_M
    tl.store(lse_ptr + lse_rows_M * num_tokens + tokens_M, lse_M, mask=inside_M)


def attention(
    q_NHTD: Tensor, k_NKLD: Tensor, v_NKLD: Tensor, *, causal: bool, num_parts: int = 0
) -> tuple[Tensor, Tensor]:
    """Return (o [N, H, T, D] in q's dtype, lse [N, H, T] fp32, natural log).

    H is a multiple of K; `causal`: T == L and row i sees keys 0..i. q, k, v have one dtype (fp32,
    fp16, bf16) and any strides but D's, which is 1. D is a power of 2, 16 or more; L > 0. Scale is
    1 / sqrt(D). Unless causal, keys are cut into about `num_parts` parts (0: as many as fill the
    device) that run beside one another. ValueError for other head dims. Twin:
    csps_kernels.twins.causal.
    """
    num_seqs, num_heads, num_tokens, dim = q_NHTD.shape
    num_kv_heads, num_keys = k_NKLD.shape[1:3]
    check_sizes(head_dim=dim)
    if not q_NHTD.numel():
        lse_NHT = q_NHTD.new_empty(q_NHTD.shape[:3], dtype=torch.float32)
        return torch.empty_like(q_NHTD), lse_NHT
    group = num_heads // num_kv_heads
    tiling = choose_tiling(num_tokens * group, 64, q_NHTD.dtype)
    num_programs = triton.cdiv(num_tokens * group, tiling.rows) * num_kv_heads * num_seqs
    if causal:
        num_parts = 1
    elif not num_parts:
        num_parts = choose_parts(num_programs, num_keys, q_NHTD.device)
    part_keys = triton.cdiv(triton.cdiv(num_keys, num_parts), tiling.keys) * tiling.keys
    num_parts = triton.cdiv(num_keys, part_keys)  # none is empty
    lse_NSHT = q_NHTD.new_empty(num_seqs, num_parts, num_heads, num_tokens, dtype=torch.float32)
    if num_parts == 1:
        o_NSHTD = torch.empty_like(q_NHTD).unsqueeze(1)
    else:
        o_NSHTD = lse_NSHT.new_empty(*lse_NSHT.shape, dim)
    _dense[(num_programs * num_parts,)](
        q_NHTD,
        k_NKLD,
        v_NKLD,
        o_NSHTD,
        lse_NSHT,
        q_NHTD.stride()[:3],
        k_NKLD.stride()[:3],
        v_NKLD.stride()[:3],
        o_NSHTD.stride()[:4],
        num_kv_heads,
        num_tokens,
        num_keys,
        num_parts,
        part_keys,
        base_2_scale(dim),
        GROUP=group,
        CAUSAL=causal,
        DIM=dim,
        ROWS=tiling.rows,
        KEYS=tiling.keys,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    if num_parts == 1:
        return o_NSHTD[:, 0], lse_NSHT[:, 0]
    return merge_parts(o_NSHTD, lse_NSHT, 1, q_NHTD.dtype)
