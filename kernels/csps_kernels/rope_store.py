"""Rotary embedding of new queries and keys, whose keys and values go into the KV pool: one launch.

By itself each of these reads and writes everything again; together each element is read once. Keys
are written twice: prefill attends to them as they are, too. Suffixes: T tokens, K KV heads, G query
heads per KV head, D head dim, P positions, S slots of the pool.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Elements of a program: enough 16-byte loads under way for every thread.
PROGRAM_ELEMENTS = 4096


# Integers that change from call to call must not each compile a kernel of their own.
@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def _rope_store(
    qk_ptr,
    v_ptr,
    table_ptr,
    positions_ptr,
    slots_ptr,
    keys_ptr,
    values_ptr,
    q_ptr,
    k_ptr,
    num_tokens,
    num_slots,
    qk_token_stride,
    qk_head_stride,
    v_token_stride,
    v_head_stride,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    STORED: tl.constexpr,
):
    """One program: TOKENS tokens of one KV head, its queries before its key (h = GROUP)."""
    tokens_T = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    kv_head = tl.program_id(1).to(tl.int64)
    heads_H = tl.arange(0, HEADS)
    dims_D = tl.arange(0, DIMS)
    is_token_T = tokens_T < num_tokens
    is_dim_D = dims_D < HALF
    DIM: tl.constexpr = 2 * HALF

    positions_T = tl.load(positions_ptr + tokens_T, mask=is_token_T, other=0).to(tl.int64)
    table_TD = table_ptr + positions_T[:, None] * DIM + dims_D[None, :]
    is_TD = is_token_T[:, None] & is_dim_D[None, :]
    cos_TD = tl.load(table_TD, mask=is_TD, other=0.0)
    sin_TD = tl.load(table_TD + HALF, mask=is_TD, other=0.0)

    # Queries and the key as one tile: cos and sin are loaded once for all of them.
    qk_TH = tokens_T[:, None] * qk_token_stride + kv_head * qk_head_stride + heads_H[None, :] * DIM
    qk_THD = qk_ptr + qk_TH[:, :, None] + dims_D[None, None, :]
    is_THD = is_TD[:, None, :] & (heads_H <= GROUP)[None, :, None]
    first_THD = tl.load(qk_THD, mask=is_THD, other=0.0).to(tl.float32)
    second_THD = tl.load(qk_THD + HALF, mask=is_THD, other=0.0).to(tl.float32)
    cos_THD, sin_THD = cos_TD[:, None, :], sin_TD[:, None, :]
    dtype = q_ptr.dtype.element_ty
    low_THD = (first_THD * cos_THD - second_THD * sin_THD).to(dtype)
    high_THD = (second_THD * cos_THD + first_THD * sin_THD).to(dtype)

    token_head_T = tokens_T * tl.num_programs(1) + kv_head
    q_TH = token_head_T[:, None] * GROUP + heads_H[None, :]
    q_THD = q_ptr + q_TH[:, :, None] * DIM + dims_D[None, None, :]
    is_query = is_THD & (heads_H < GROUP)[None, :, None]
    tl.store(q_THD, low_THD, mask=is_query)
    tl.store(q_THD + HALF, high_THD, mask=is_query)

    is_key = is_THD & (heads_H == GROUP)[None, :, None]
    k_T1D = k_ptr + token_head_T[:, None, None] * DIM + dims_D[None, None, :]
    k_THD = tl.broadcast_to(k_T1D, [TOKENS, HEADS, DIMS])
    tl.store(k_THD, low_THD, mask=is_key)
    tl.store(k_THD + HALF, high_THD, mask=is_key)
    if STORED:
        slots_T = tl.load(slots_ptr + tokens_T, mask=is_token_T, other=-1).to(tl.int64)
        places_T = (kv_head * num_slots + slots_T) * DIM
        is_stored_TD = is_TD & (slots_T >= 0)[:, None]
        keys_T1D = keys_ptr + places_T[:, None, None] + dims_D[None, None, :]
        keys_THD = tl.broadcast_to(keys_T1D, [TOKENS, HEADS, DIMS])
        is_key &= is_stored_TD[:, None, :]
        tl.store(keys_THD, low_THD, mask=is_key)
        tl.store(keys_THD + HALF, high_THD, mask=is_key)
        v_T = tokens_T * v_token_stride + kv_head * v_head_stride
        v_TD = v_ptr + v_T[:, None] + dims_D[None, :]
        values_TD = values_ptr + places_T[:, None] + dims_D[None, :]
        tl.store(values_TD, tl.load(v_TD, mask=is_stored_TD), mask=is_stored_TD)
        tl.store(values_TD + HALF, tl.load(v_TD + HALF, mask=is_stored_TD), mask=is_stored_TD)


class Places(NamedTuple):
    """Where new tokens' K and V go: `keys` and `values` [K, S, D], contiguous, are one layer's.

    `slots_T`: integers, distinct; a token of slot -1 is not stored.
    """

    slots_T: Tensor
    keys_KSD: Tensor
    values_KSD: Tensor


def rope_store(
    qk_TKHD: Tensor,
    v_TKD: Tensor,
    table_PD: Tensor,
    positions_T: Tensor,
    places: Places | None,
) -> tuple[Tensor, Tensor]:
    """Rotated queries [T, K * G, D] and keys [T, K, D]; keys and values also go to their places.

    qk is [T, K, G + 1, D], each KV head's queries before its key, and v [T, K, D]: views of the
    fused projections' output, heads of qk behind one another. All are of the pool's dtype (fp32,
    fp16, bf16), rotated in fp32. `table`: fp32, cos in [:, :D/2], sin behind it; dimension i goes
    with i + D/2. Positions are integers. Twin: csps_kernels.twins.rope_store.
    """
    num_tokens, num_kv_heads, num_heads, dim = qk_TKHD.shape
    assert qk_TKHD.stride()[2:] == (dim, 1)
    assert v_TKD.stride(2) == 1
    q_THD = qk_TKHD.new_empty(num_tokens, num_kv_heads * (num_heads - 1), dim)
    k_TKD = qk_TKHD.new_empty(num_tokens, num_kv_heads, dim)
    if not qk_TKHD.numel():
        return q_THD, k_TKD
    if places is not None:
        assert places.keys_KSD.is_contiguous()
        assert places.values_KSD.is_contiguous()
    heads, dims = triton.next_power_of_2(num_heads), triton.next_power_of_2(dim // 2)
    tokens = max(PROGRAM_ELEMENTS // (2 * heads * dims), 1)
    slots_T, keys_KSD, values_KSD = places or (None, None, None)
    _rope_store[(triton.cdiv(num_tokens, tokens), num_kv_heads)](
        qk_TKHD,
        v_TKD,
        table_PD,
        positions_T,
        slots_T,
        keys_KSD,
        values_KSD,
        q_THD,
        k_TKD,
        num_tokens,
        0 if keys_KSD is None else keys_KSD.shape[1],
        *qk_TKHD.stride()[:2],
        *v_TKD.stride()[:2],
        GROUP=num_heads - 1,
        HALF=dim // 2,
        TOKENS=tokens,
        HEADS=heads,
        DIMS=dims,
        STORED=places is not None,
    )
    return q_THD, k_TKD
