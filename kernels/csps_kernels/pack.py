"""Messages of an all-to-all, written and read in one launch for all peers.

Two kinds. Rows of partial outputs: each row's o and its log-sum-exps behind one another, as
csps.attention.merge packs them. Heads of tokens (Ulysses): for each peer its heads of q, k and v
of all tokens. Messages of all peers lie behind one another in one buffer, whose slices are sent.

Suffixes: T rows here, N rows of messages, H heads, K KV heads, D head dim, C columns (a head of
one peer's message), X bytes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program: enough 16-byte accesses under way for every thread.
PROGRAM_ELEMENTS = 4096


@triton.jit(do_not_specialize=["num_heads"])
def _copy_partials(
    o_ptr,
    lse_ptr,
    rows_ptr,
    o_message_ptr,
    lse_message_ptr,
    num_heads,
    o_row_stride,
    lse_row_stride,
    o_message_stride,
    lse_message_stride,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    UNPACK: tl.constexpr,
):
    """One program: HEADS heads of one row, into its message or out of it.

    The message as seen through o's type and through fp32: log-sum-exps begin behind o.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(rows_ptr + row).to(tl.int64)
    heads_H = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims_D = tl.arange(0, DIMS)
    is_head_H = heads_H < num_heads
    is_HD = is_head_H[:, None] & (dims_D < DIM)[None, :]
    in_row_HD = heads_H[:, None] * DIM + dims_D[None, :]
    o_HD = o_ptr + place * o_row_stride + in_row_HD
    lse_H = lse_ptr + place * lse_row_stride + heads_H
    o_message_HD = o_message_ptr + row * o_message_stride + in_row_HD
    lse_message_H = lse_message_ptr + row * lse_message_stride
    lse_message_H += lse_message_stride - num_heads + heads_H
    if UNPACK:
        part_HD = tl.load(o_message_HD, mask=is_HD)
        tl.store(o_HD, part_HD.to(o_ptr.dtype.element_ty), mask=is_HD)
        tl.store(lse_H, tl.load(lse_message_H, mask=is_head_H), mask=is_head_H)
    else:
        part_HD = tl.load(o_HD, mask=is_HD)
        tl.store(o_message_HD, part_HD.to(o_message_ptr.dtype.element_ty), mask=is_HD)
        tl.store(lse_message_H, tl.load(lse_H, mask=is_head_H), mask=is_head_H)


def pack_partials(o_THD: Tensor, lse_TH: Tensor, rows_N: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [N, H * (D * e + 4)]: rows `rows_N` of o, as `dtype`, and of lse (fp32).

    Rows of o and lse may lie apart, what is in a row may not; rows_N holds integers. H * D * e is
    a multiple of 4. Twin: csps_kernels.twins.pack.
    """
    num_heads, head_dim = o_THD.shape[1:]
    row_bytes = num_heads * (head_dim * dtype.itemsize + 4)
    message_NX = torch.empty(len(rows_N), row_bytes, dtype=torch.uint8, device=o_THD.device)
    _launch_partials(o_THD, lse_TH, rows_N, message_NX, dtype, unpack=False)
    return message_NX


def unpack_partials(
    message_NX: Tensor, rows_N: Tensor, dtype: torch.dtype, o_THD: Tensor, lse_TH: Tensor
) -> None:
    """Rows of `pack_partials` to the distinct rows `rows_N` of o (any dtype) and lse (fp32)."""
    _launch_partials(o_THD, lse_TH, rows_N, message_NX, dtype, unpack=True)


def _launch_partials(
    o_THD: Tensor,
    lse_TH: Tensor,
    rows_N: Tensor,
    message_NX: Tensor,
    dtype: torch.dtype,
    *,
    unpack: bool,
) -> None:
    num_heads, head_dim = o_THD.shape[1:]
    assert o_THD.stride()[1:] == (head_dim, 1)
    assert lse_TH.stride(1) == 1
    if not message_NX.numel():
        return
    o_message, lse_message = message_NX.view(dtype), message_NX.view(torch.float32)
    dims = triton.next_power_of_2(head_dim)
    heads = min(triton.next_power_of_2(num_heads), max(PROGRAM_ELEMENTS // dims, 1))
    _copy_partials[(len(rows_N), triton.cdiv(num_heads, heads))](
        o_THD,
        lse_TH,
        rows_N,
        o_message,
        lse_message,
        num_heads,
        o_THD.stride(0),
        lse_TH.stride(0),
        o_message.stride(0),
        lse_message.stride(0),
        DIM=head_dim,
        HEADS=heads,
        DIMS=dims,
        UNPACK=unpack,
    )


class HeadColumns(NamedTuple):
    """Where each head of each peer's message comes from, or goes to; the same in every layer.

    `table`: int32 [C, 4] on the device: head of the sources placed side by side, heads of all
    tokens in messages before this one, heads per token in this one, place among these.
    """

    table: Tensor
    widths: tuple[int, ...]  # heads per token, by peer


def head_columns(heads_by_peer: Sequence[Sequence[int]], device: torch.device) -> HeadColumns:
    """`heads_by_peer[p]`: what the message of peer p holds of each token, in its order."""
    rows, before = [], 0
    for heads in heads_by_peer:
        rows += [(head, before, len(heads), place) for place, head in enumerate(heads)]
        before += len(heads)
    table = torch.tensor(rows, dtype=torch.int32).view(-1, 4)
    return HeadColumns(table.to(device), tuple(len(heads) for heads in heads_by_peer))


@triton.jit(do_not_specialize=["num_tokens", "num_first", "num_second"])
def _copy_heads(
    first_ptr,
    second_ptr,
    third_ptr,
    table_ptr,
    message_ptr,
    num_tokens,
    num_first,
    num_second,
    first_strides,
    second_strides,
    third_strides,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    DIMS: tl.constexpr,
    UNPACK: tl.constexpr,
):
    """One program: one head of TOKENS tokens, into its peer's message or out of it."""
    tokens_T = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    dims_D = tl.arange(0, DIMS)
    is_TD = (tokens_T < num_tokens)[:, None] & (dims_D < DIM)[None, :]
    row = table_ptr + tl.program_id(1) * 4
    head, before = tl.load(row), tl.load(row + 1).to(tl.int64)
    width, column = tl.load(row + 2), tl.load(row + 3)
    in_message_T = before * num_tokens + tokens_T * width + column
    message_TD = message_ptr + in_message_T[:, None] * DIM + dims_D[None, :]
    if UNPACK:
        # Into one tensor: a pointer to one of three would be stored to 2 bytes at a time.
        places_T = first_ptr + tokens_T * first_strides[0] + head * first_strides[1]
        tl.store(places_T[:, None] + dims_D[None, :], tl.load(message_TD, mask=is_TD), mask=is_TD)
    else:
        # One of three tensors: a program's head is in exactly one.
        if head < num_first:
            places_T = first_ptr + tokens_T * first_strides[0] + head * first_strides[1]
        elif head < num_first + num_second:
            head -= num_first
            places_T = second_ptr + tokens_T * second_strides[0] + head * second_strides[1]
        else:
            head -= num_first + num_second
            places_T = third_ptr + tokens_T * third_strides[0] + head * third_strides[1]
        tl.store(message_TD, tl.load(places_T[:, None] + dims_D[None, :], mask=is_TD), mask=is_TD)


def pack_heads(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, columns: HeadColumns) -> Tensor:
    """Messages to all peers, of q's dtype, behind one another: [T * C, D].

    Heads of `columns` count those of q, k and v one behind the other; a head may go to several
    peers. Peer p's message is [T, widths[p], D]. Only D must be contiguous. Twin:
    csps_kernels.twins.pack.
    """
    num_tokens, _, head_dim = q_THD.shape
    message = q_THD.new_empty(num_tokens * len(columns.table), head_dim)
    _launch_heads((q_THD, k_TKD, v_TKD), columns, message, unpack=False)
    return message


def unpack_heads(message: Tensor, columns: HeadColumns, out_THD: Tensor) -> None:
    """Messages of `pack_heads`'s form into out's heads; none may be in two of them."""
    _launch_heads((out_THD, out_THD[:, :0], out_THD[:, :0]), columns, message, unpack=True)


def _launch_heads(
    tensors: tuple[Tensor, Tensor, Tensor], columns: HeadColumns, message: Tensor, *, unpack: bool
) -> None:
    num_tokens, _, head_dim = tensors[0].shape
    assert all(x.stride(2) == 1 for x in tensors)
    if not message.numel():
        return
    dims = triton.next_power_of_2(head_dim)
    tokens = min(triton.next_power_of_2(num_tokens), max(PROGRAM_ELEMENTS // dims, 1))
    _copy_heads[(triton.cdiv(num_tokens, tokens), len(columns.table))](
        *tensors,
        columns.table,
        message,
        num_tokens,
        *(x.shape[1] for x in tensors[:2]),
        *(x.stride()[:2] for x in tensors),
        DIM=head_dim,
        TOKENS=tokens,
        DIMS=dims,
        UNPACK=unpack,
    )
