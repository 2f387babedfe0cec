"""Which heads a rank has, for any numbers of heads and ranks."""

from hypothesis import given
from hypothesis import strategies as st

from csps.core.heads import HeadPart, all_heads

SHAPES = st.tuples(st.integers(1, 16), st.integers(1, 12))  # query heads per KV head, KV heads


def query_heads(part: HeadPart, group: int) -> list[int]:
    return [
        head * group + query
        for head in range(part.first, part.stop)
        for query in range(part.group_first, part.group_stop)
    ]


@given(SHAPES, st.integers(1, 40))
def test_every_query_head_is_in_exactly_one_part(shape, num_parts):
    group, num_kv_heads = shape
    parts = all_heads(group * num_kv_heads, num_kv_heads).split(num_parts)
    assert len(parts) == num_parts
    covered = [head for part in parts for head in query_heads(part, group)]
    assert covered == list(range(group * num_kv_heads))


@given(SHAPES, st.integers(1, 6), st.integers(1, 6))
def test_parts_of_parts_cover_too(shape, tp, sp):
    group, num_kv_heads = shape
    parts = [
        part
        for row in all_heads(group * num_kv_heads, num_kv_heads).split(tp)
        for part in row.split(sp)
    ]
    covered = [head for part in parts for head in query_heads(part, group)]
    assert covered == list(range(group * num_kv_heads))


@given(SHAPES, st.integers(1, 40))
def test_parts_differ_by_a_kv_head_or_by_their_share_of_one(shape, num_parts):
    group, num_kv_heads = shape
    parts = all_heads(group * num_kv_heads, num_kv_heads).split(num_parts)
    sizes = [part.num_kv_heads for part in parts]
    if num_kv_heads >= num_parts:
        assert max(sizes) - min(sizes) <= 1
        assert all(part.group_size == group for part in parts)
    else:
        assert max(sizes) == 1
        sharers = -(-num_parts // num_kv_heads)
        assert all(part.num_heads >= group // sharers for part in parts)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_factorisations_agree_where_kv_heads_divide_evenly(group, per_rank, sp, tp):
    """Every rank keeps the same KV, whichever way the mesh is cut."""
    heads = all_heads(group * per_rank * sp * tp, per_rank * sp * tp)
    nested = [part for row in heads.split(tp) for part in row.split(sp)]
    assert nested == heads.split(sp * tp)


def test_nine_query_and_three_kv_heads():
    """The default model: over two ranks, and over four, two of which share a KV head."""
    heads = all_heads(9, 3)
    assert heads.split(2) == [HeadPart(0, 1, 0, 3), HeadPart(1, 3, 0, 3)]
    four = [HeadPart(0, 1, 0, 1), HeadPart(0, 1, 1, 3), HeadPart(1, 2, 0, 3), HeadPart(2, 3, 0, 3)]
    assert heads.split(4) == four
    assert [part for half in heads.split(2) for part in half.split(2)] == four
