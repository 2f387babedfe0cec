"""Messages of all-to-alls by head, written and read in one launch for all peers.

A table names, for every head of every peer's message, where it comes from or goes to; it is the
same in every layer. Messages of the peers lie behind one another in one buffer, whose slices are
sent. What a rank has for itself is no message: it lies apart, in `own`, so that it may be written
to where it is wanted and read from where it was computed.

Suffixes: T tokens, N rows, H heads, K KV heads, D head dim, C columns (a head of one peer), W heads
of `own` or 4-byte words, M heads of messages, all tokens', X bytes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program: enough 16-byte accesses under way for every thread.
PROGRAM_ELEMENTS = 4096


class HeadColumns(NamedTuple):
    """Where each head of each peer comes from, or goes to.

    `table`: int32 [C, 4] on the device: head of the sources placed side by side, heads of a token
    in messages before this one (-1: this one is `own`), heads of a token in this one, place among
    these. `num_sent`: heads of a token in all messages; `num_own`: in `own`.
    """

    table: Tensor
    num_sent: int
    num_own: int


def head_columns(
    heads_by_peer: Sequence[Sequence[int]], own: int, device: torch.device, *, once: bool = False
) -> HeadColumns:
    """`heads_by_peer[p]`: what peer p's message holds of each token, in order; that of `own` stays.

    `once`: a head that several peers have is the first one's, so that no two programs write it.
    """
    rows, before, seen = [], 0, set()
    for peer, heads in enumerate(heads_by_peer):
        at = -1 if peer == own else before
        for place, head in enumerate(heads):
            if not (once and head in seen):
                rows.append((head, at, len(heads), place))
            seen.add(head)
        before += 0 if peer == own else len(heads)
    table = torch.tensor(rows, dtype=torch.int32).view(-1, 4)
    return HeadColumns(table.to(device), before, len(heads_by_peer[own]))


@triton.jit(do_not_specialize=["num_tokens", "num_first", "num_second"])
def _copy_heads(
    first_ptr,
    second_ptr,
    third_ptr,
    table_ptr,
    message_ptr,
    own_ptr,
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
    """One program: one head of TOKENS tokens, into its peer's message or out of it.

    Each tensor has a branch with its load or store: a pointer to one of several would be read or
    stored to 2 bytes at a time.
    """
    tokens_T = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    dims_D = tl.arange(0, DIMS)
    is_TD = (tokens_T < num_tokens)[:, None] & (dims_D < DIM)[None, :]
    row = table_ptr + tl.program_id(1) * 4
    head, before = tl.load(row), tl.load(row + 1).to(tl.int64)
    width, column = tl.load(row + 2), tl.load(row + 3)
    is_own = before < 0
    in_message_TD = (tokens_T * width + column)[:, None] * DIM + dims_D[None, :]
    message_ptr += before * num_tokens * DIM
    if UNPACK:
        if is_own:
            part_TD = tl.load(own_ptr + in_message_TD, mask=is_TD)
        else:
            part_TD = tl.load(message_ptr + in_message_TD, mask=is_TD)
        places_T = tokens_T * first_strides[0] + head * first_strides[1]
        tl.store(first_ptr + places_T[:, None] + dims_D[None, :], part_TD, mask=is_TD)
    else:
        # A program's head is in exactly one of three tensors.
        if head < num_first:
            places_T = tokens_T * first_strides[0] + head * first_strides[1]
            part_TD = tl.load(first_ptr + places_T[:, None] + dims_D[None, :], mask=is_TD)
        elif head < num_first + num_second:
            head -= num_first
            places_T = tokens_T * second_strides[0] + head * second_strides[1]
            part_TD = tl.load(second_ptr + places_T[:, None] + dims_D[None, :], mask=is_TD)
        else:
            head -= num_first + num_second
            places_T = tokens_T * third_strides[0] + head * third_strides[1]
            part_TD = tl.load(third_ptr + places_T[:, None] + dims_D[None, :], mask=is_TD)
        if is_own:
            tl.store(own_ptr + in_message_TD, part_TD, mask=is_TD)
        else:
            tl.store(message_ptr + in_message_TD, part_TD, mask=is_TD)


def pack_heads(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, columns: HeadColumns, own_TWD: Tensor
) -> Tensor:
    """Messages to the other peers, of q's dtype, behind one another: [M, D]; fills `own`.

    Heads of `columns` count those of q, k and v one behind the other; a head may go to several
    peers. A message is [T, its heads, D]. Only D must be contiguous, but all of `own`. Twin:
    csps_kernels.twins.pack.
    """
    num_tokens, _, head_dim = q_THD.shape
    message_MD = q_THD.new_empty(num_tokens * columns.num_sent, head_dim)
    _launch_heads((q_THD, k_TKD, v_TKD), columns, message_MD, own_TWD, unpack=False)
    return message_MD


def unpack_heads(
    message_MD: Tensor, columns: HeadColumns, own_TWD: Tensor, out_THD: Tensor
) -> None:
    """Messages of `pack_heads`'s form, and `own`, into out's heads; `columns` has each only once.

    Only D of out must be contiguous.
    """
    none_T0D = out_THD[:, :0]
    tensors = out_THD, none_T0D, none_T0D
    _launch_heads(tensors, columns, message_MD, own_TWD, unpack=True)


def _launch_heads(
    tensors: tuple[Tensor, Tensor, Tensor],
    columns: HeadColumns,
    message_MD: Tensor,
    own_TWD: Tensor,
    *,
    unpack: bool,
) -> None:
    num_tokens, _, head_dim = tensors[0].shape
    assert all(x.stride(2) == 1 for x in tensors)
    assert message_MD.is_contiguous()
    assert message_MD.shape == (num_tokens * columns.num_sent, head_dim)
    assert own_TWD.is_contiguous()
    assert own_TWD.shape == (num_tokens, columns.num_own, head_dim)
    if not num_tokens or not len(columns.table):
        return
    tokens, dims = _tile(num_tokens, head_dim)
    _copy_heads[(triton.cdiv(num_tokens, tokens), len(columns.table))](
        *tensors,
        columns.table,
        message_MD,
        own_TWD,
        num_tokens,
        *(x.shape[1] for x in tensors[:2]),
        *(x.stride()[:2] for x in tensors),
        DIM=head_dim,
        TOKENS=tokens,
        DIMS=dims,
        UNPACK=unpack,
    )


def _tile(num_rows: int, head_dim: int) -> tuple[int, int]:
    """Rows and dims of a program, powers of 2."""
    dims = triton.next_power_of_2(head_dim)
    return min(triton.next_power_of_2(num_rows), max(PROGRAM_ELEMENTS // dims, 1)), dims


# Own rows begin behind other ranks', seldom at a multiple of 16 bytes.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["own_ptr"])
def _copy_partials(
    o_ptr,
    lse_ptr,
    table_ptr,
    message_ptr,
    own_ptr,
    num_rows,
    o_row_stride,
    lse_row_stride,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """One program: one head of ROWS rows, into its peer's message.

    All of it seen as 4-byte words, an lse being one and DIM a head's o. In each row of a message
    log-sum-exps begin behind o.
    """
    rows_N = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims_D = tl.arange(0, DIMS)
    is_row_N = rows_N < num_rows
    is_ND = is_row_N[:, None] & (dims_D < DIM)[None, :]
    row = table_ptr + tl.program_id(1) * 4
    head, before = tl.load(row), tl.load(row + 1).to(tl.int64)
    width, column = tl.load(row + 2), tl.load(row + 3)
    o_ND = o_ptr + (rows_N * o_row_stride + head * DIM)[:, None] + dims_D[None, :]
    part_ND = tl.load(o_ND, mask=is_ND)
    lse_N = tl.load(lse_ptr + rows_N * lse_row_stride + head, mask=is_row_N)
    in_message_N = rows_N * width * (DIM + 1)
    o_at_ND = (in_message_N + column * DIM)[:, None] + dims_D[None, :]
    lse_at_N = in_message_N + width * DIM + column
    if before < 0:
        tl.store(own_ptr + o_at_ND, part_ND, mask=is_ND)
        tl.store(own_ptr + lse_at_N, lse_N, mask=is_row_N)
    else:
        message_ptr += before * num_rows * (DIM + 1)
        tl.store(message_ptr + o_at_ND, part_ND, mask=is_ND)
        tl.store(message_ptr + lse_at_N, lse_N, mask=is_row_N)


def pack_partials(o_NHD: Tensor, lse_NH: Tensor, columns: HeadColumns, own_NX: Tensor) -> Tensor:
    """Messages to the other peers, uint8 [X], behind one another; fills `own`, uint8.

    Each is [N, h * (D * e + 4)] of its h heads: o of e bytes an element, then lse (fp32), as
    csps.attention.merge packs rows. Rows of o and lse may lie apart, what is in a row may not;
    `own` is contiguous. Rows of o, a head of it and `own` begin at multiples of 4 bytes. Twin:
    csps_kernels.twins.pack.
    """
    num_rows, _, head_dim = o_NHD.shape
    head_bytes = head_dim * o_NHD.element_size() + 4
    assert lse_NH.dtype == torch.float32
    assert own_NX.is_contiguous()
    assert own_NX.shape == (num_rows, columns.num_own * head_bytes)
    size = num_rows * columns.num_sent * head_bytes
    message_X = torch.empty(size, dtype=torch.uint8, device=o_NHD.device)
    if not num_rows or not len(columns.table):
        return message_X
    assert o_NHD.stride()[1:] == (head_dim, 1)
    assert lse_NH.stride(1) == 1
    # Where own rows have no heads, they may begin anywhere.
    own_X = own_NX.view(-1) if columns.num_own else message_X
    o_NHW, lse_NH, message_W, own_W = (
        x.view(torch.int32) for x in (o_NHD, lse_NH, message_X, own_X)
    )
    num_words = o_NHW.shape[2]
    rows, dims = _tile(num_rows, num_words)
    _copy_partials[(triton.cdiv(num_rows, rows), len(columns.table))](
        o_NHW,
        lse_NH,
        columns.table,
        message_W,
        own_W,
        num_rows,
        o_NHW.stride(0),
        lse_NH.stride(0),
        DIM=num_words,
        ROWS=rows,
        DIMS=dims,
    )
    return message_X
