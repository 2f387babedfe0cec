"""Scaling: id counts stay right, sharing stays exact, sessions stay whole."""

import tempfile
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csps.core.errors import ConfigError
from csps.trace.scale import Scaling, scale
from csps.trace.schema import Trace, TraceRequest, read_trace, write_trace
from tests.unit.traces import AT_ANY_SPEED, BLOCK_TOKENS, num_shared, traces


def assert_reads_back(trace: Trace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        write_trace(path, trace)
        assert read_trace(path) == (trace, [])


@AT_ANY_SPEED
@given(traces())
def test_what_is_written_is_read(trace: Trace) -> None:
    assert_reads_back(trace)


@AT_ANY_SPEED
@given(traces(), st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.integers(1, 400))
def test_prompts_share_as_much_as_before(trace: Trace, divide: int, max_prompt: int) -> None:
    small = scale(trace, Scaling(divide=divide, max_prompt=max_prompt))
    assert small.block_tokens == BLOCK_TOKENS // divide
    assert_reads_back(small)  # which counts the ids
    cap = -(-max_prompt // small.block_tokens)
    pairs = zip(combinations(trace.requests, 2), combinations(small.requests, 2), strict=True)
    for before, after in pairs:
        assert num_shared(*after) == min(num_shared(*before), cap)
    for before, after in zip(trace.requests, small.requests, strict=True):
        assert after.prompt_tokens == min(-(-before.prompt_tokens // divide), max_prompt)
        assert after.output_tokens == -(-before.output_tokens // divide)


@AT_ANY_SPEED
@given(traces(), st.floats(0, 500), st.floats(1, 500), st.integers(1, 4))
def test_slices_and_samples_keep_sessions_whole(
    trace: Trace, from_s: float, length_s: float, one_in: int
) -> None:
    scaling = Scaling(from_s=from_s, to_s=from_s + length_s, one_in=one_in)
    try:
        kept = scale(trace, scaling).requests
    except ConfigError:
        kept = ()
    sizes = {r.session: sum(x.session == r.session for x in trace.requests) for r in kept}
    assert len(kept) == sum(sizes.values())
    assert all(request.arrival_s >= 0 for request in kept)
    begins = {r.session: r.arrival_s for r in reversed(trace.requests)}
    inside = {s for s, start in begins.items() if from_s <= start < from_s + length_s}
    assert set(sizes) <= inside
    if one_in == 1:
        assert set(sizes) == inside


def requests(*arrivals_s: float) -> Trace:
    rows = (TraceRequest(at, 64, 9, (i,), session=i) for i, at in enumerate(arrivals_s))
    return Trace("t", "", BLOCK_TOKENS, tuple(rows))


def test_a_cut_slice_is_what_arrives_in_it_on_its_own_clock() -> None:
    one = tuple(TraceRequest(at, 64, 9, (0,), session=0) for at in (1.0, 5.0, 6.0, 9.0))
    trace = Trace("t", "", BLOCK_TOKENS, one)
    cut = scale(trace, Scaling(from_s=5, to_s=9, cut=True))
    assert [r.arrival_s for r in cut.requests] == [0.0, 1.0]
    with pytest.raises(ConfigError, match="leave no request"):
        scale(trace, Scaling(from_s=5, to_s=9))  # its only session began before


def test_speed_output_and_number() -> None:
    trace = requests(0.0, 3.0, 6.0)
    fast = scale(trace, Scaling(speed=3, max_requests=2, divide=16, divide_output=2))
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in fast.requests] == [
        (0.0, 4, 5),
        (1.0, 4, 5),
    ]
    assert fast.source.endswith(
        "csps trace scale --max-requests 2 --divide 16 --divide-output 2 --speed 3"
    )


def test_the_sample_is_that_of_published_subsets() -> None:
    # Of 1,000 sessions these are the first with sha256(str(session)) mod 16 = 0.
    kept = scale(requests(*map(float, range(1000))), Scaling(one_in=16)).requests
    assert [r.session for r in kept[:3]] == [23, 38, 76]
    assert 40 < len(kept) < 90


@pytest.mark.parametrize(
    ("scaling", "text"),
    [
        (Scaling(divide=3), "--divide: expected a divisor of the trace's block size, 64 tokens"),
        (Scaling(divide=0), "--divide: expected at least 1"),
        (Scaling(divide_output=0), "--divide-output: expected at least 1"),
        (Scaling(one_in=-1), "--one-in: expected at least 1"),
        (Scaling(max_requests=0), "--max-requests: expected at least 1"),
        (Scaling(max_prompt=0), "--max-prompt: expected at least 1"),
        (Scaling(speed=0), "--speed: expected a number above 0"),
        (Scaling(speed=float("nan")), "--speed: expected a number above 0"),
        (Scaling(from_s=2, to_s=2), "--from, --to: expected 0 <= from < to"),
        (Scaling(from_s=-1), "--from, --to: expected 0 <= from < to"),
    ],
)
def test_values_that_make_no_sense(scaling: Scaling, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scale(requests(0.0), scaling)
    assert text in str(caught.value)
