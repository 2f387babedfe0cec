"""Prompts of a trace share what its block ids share, and nothing else."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csps.replay.play import too_long
from csps.replay.prompts import PromptMaker
from csps.trace.schema import TraceRequest

BLOCK = 16
VOCAB = 5000
TEXT = list(range(VOCAB))  # every window is another


def request_of(blocks: tuple[int, ...], short_by: int = 0, output: int = 1) -> TraceRequest:
    return TraceRequest(0.0, len(blocks) * BLOCK - short_by, output, blocks, session=0)


def shared_tokens(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@pytest.mark.parametrize("text_ids", [None, TEXT])
@given(
    common=st.lists(st.integers(0, 10**9), max_size=4),
    tails=st.lists(st.integers(0, 10**9), min_size=2, max_size=2, unique=True),
    short_by=st.integers(0, BLOCK - 1),
)
def test_prompts_share_their_common_blocks_and_no_more(text_ids, common, tails, short_by):
    maker = PromptMaker(BLOCK, VOCAB, seed=3, text_ids=text_ids)
    first = maker.prompt(request_of((*common, tails[0])))
    second = maker.prompt(request_of((*common, tails[1]), short_by))
    assert len(first) == (len(common) + 1) * BLOCK
    assert len(second) == len(first) - short_by
    assert all(0 <= token < VOCAB for token in first)
    shared = shared_tokens(first, second)
    assert shared >= len(common) * BLOCK
    # Two of VOCAB random tokens in a row agree by chance less than once in ten million.
    assert shared < len(common) * BLOCK + 2 or short_by >= BLOCK - 2


@pytest.mark.parametrize("text_ids", [None, TEXT])
def test_another_seed_shares_nothing(text_ids):
    request = request_of((1, 2, 3))
    first, second = (PromptMaker(BLOCK, VOCAB, s, text_ids).prompt(request) for s in (0, 1))
    assert shared_tokens(first, second) < 2
    assert PromptMaker(BLOCK, VOCAB, 0, text_ids).prompt(request) == first


def test_text_prompts_are_of_text():
    maker = PromptMaker(BLOCK, VOCAB, 0, TEXT)
    block = maker.prompt(request_of((7,)))
    assert [b - a for a, b in pairwise(block[8:])] == [1] * 7


def test_too_long_counts_prompt_and_output():
    requests = [request_of((1, 2)), request_of((1, 2), output=2), request_of((1,), output=99)]
    assert list(too_long(requests, 2 * BLOCK + 1)) == [(1, 34), (2, 115)]
