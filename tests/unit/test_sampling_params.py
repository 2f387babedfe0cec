"""Limits of SamplingParams: each edge is taken, one step beyond it is refused by name."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csps.core.errors import InvalidRequestError
from csps.core.request import (
    MAX_LOGPROBS,
    MAX_PROMPT_LOGPROBS,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

VOCAB_SIZE = 100


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=5, min_tokens=5),
        SamplingParams(min_tokens=5),
        SamplingParams(temperature=100.0),
        SamplingParams(top_p=1e-6),
        SamplingParams(top_k=10 * VOCAB_SIZE),
        SamplingParams(seed=0),
        SamplingParams(seed=2**63 - 1),
        SamplingParams(logprobs=0),
        SamplingParams(logprobs=MAX_LOGPROBS),
        SamplingParams(prompt_logprobs=1),
        SamplingParams(prompt_logprobs=MAX_PROMPT_LOGPROBS),
        SamplingParams(stop=("x" * MAX_STOP_STRING_CHARS,) * MAX_STOP_STRINGS),
        SamplingParams(stop_token_ids=(0, VOCAB_SIZE - 1)),
        SamplingParams(stop_token_ids=(1,) * MAX_STOP_TOKEN_IDS),
    ],
)
def test_edges_are_valid(params: SamplingParams) -> None:
    params.validate(VOCAB_SIZE)


@pytest.mark.parametrize(
    ("field", "params"),
    [
        ("max_tokens", SamplingParams(max_tokens=0)),
        ("max_tokens", SamplingParams(max_tokens=-1)),
        ("min_tokens", SamplingParams(min_tokens=-1)),
        ("min_tokens", SamplingParams(max_tokens=4, min_tokens=5)),
        ("temperature", SamplingParams(temperature=-0.1)),
        ("temperature", SamplingParams(temperature=100.1)),
        ("temperature", SamplingParams(temperature=math.nan)),
        ("temperature", SamplingParams(temperature=math.inf)),
        ("top_p", SamplingParams(top_p=0.0)),
        ("top_p", SamplingParams(top_p=1.1)),
        ("top_p", SamplingParams(top_p=-1.0)),
        ("top_p", SamplingParams(top_p=math.nan)),
        ("top_k", SamplingParams(top_k=-1)),
        ("seed", SamplingParams(seed=-1)),
        ("seed", SamplingParams(seed=2**63)),
        ("logprobs", SamplingParams(logprobs=-1)),
        ("logprobs", SamplingParams(logprobs=MAX_LOGPROBS + 1)),
        ("prompt_logprobs", SamplingParams(prompt_logprobs=-1)),
        ("prompt_logprobs", SamplingParams(prompt_logprobs=0)),
        ("prompt_logprobs", SamplingParams(prompt_logprobs=MAX_PROMPT_LOGPROBS + 1)),
        ("stop", SamplingParams(stop=("",))),
        ("stop", SamplingParams(stop=("x" * (MAX_STOP_STRING_CHARS + 1),))),
        ("stop", SamplingParams(stop=("x",) * (MAX_STOP_STRINGS + 1))),
        ("stop_token_ids", SamplingParams(stop_token_ids=(VOCAB_SIZE,))),
        ("stop_token_ids", SamplingParams(stop_token_ids=(-1,))),
        ("stop_token_ids", SamplingParams(stop_token_ids=(1,) * (MAX_STOP_TOKEN_IDS + 1))),
    ],
)
def test_beyond_the_edge_names_the_field(field: str, params: SamplingParams) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        params.validate(VOCAB_SIZE)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


@given(
    temperature=st.floats(width=32),
    top_p=st.floats(width=32),
    top_k=st.integers(-(2**31), 2**31 - 1),
)
def test_any_number_is_judged(temperature: float, top_p: float, top_k: int) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k)
    is_valid = 0 <= temperature <= 100 and 0 < top_p <= 1 and top_k >= 0
    if is_valid:
        params.validate(VOCAB_SIZE)
    else:
        with pytest.raises(InvalidRequestError):
            params.validate(VOCAB_SIZE)
