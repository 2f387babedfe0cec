import pytest
from hypothesis import given
from hypothesis import strategies as st

from csps.records.capacity import Objective, find_capacity
from csps.records.rows import RequestRow, Status


@given(st.floats(0.5, 1000), st.sampled_from([0.01, 0.05, 0.2]))
def test_finds_the_limit_from_below(limit: float, tolerance: float) -> None:
    found = find_capacity(lambda rate: rate <= limit, 0.5, 1.0, tolerance)
    assert found.highest <= limit <= found.highest * (1 + tolerance) + 1e-9
    assert found.lowest_missed is not None
    assert found.lowest_missed > limit
    assert all(met == (rate <= limit) for rate, met in found.tried)


def test_nothing_meets_it() -> None:
    assert find_capacity(lambda rate: False, 1.0, 2.0).highest == 0.0


def test_everything_meets_it() -> None:
    found = find_capacity(lambda rate: True, 1.0, 2.0)
    assert found.highest > 1e5
    assert found.lowest_missed is None


def row(ttft_s: float, queue_s: float, *gaps_ms: float, status: Status = Status.DONE) -> RequestRow:
    return RequestRow("0", 0.0, 0.0, 10, 3, 3, status, 9.0, queue_s, ttft_s, gaps_ms)


@pytest.mark.parametrize(
    ("rows", "met"),
    [
        ([row(1.0, 0.5, 50.0, 60.0)], True),
        ([row(1.0, 0.5, 50.0, 101.0)], False),  # a slow token
        ([row(4.0, 2.5, 50.0)], False),  # queued too long
        ([row(1.0, 2.5, 50.0), *[row(1.0, 0.1, 50.0)] * 2], True),  # but not in the median
        ([row(3.1, 0.5, 50.0)], False),  # a late first token
        ([row(1.0, 0.5, 50.0, status=Status.FAILED)], False),
        ([], False),
    ],
)
def test_objective(rows: list[RequestRow], met: bool) -> None:
    assert Objective(tbt_ms=100.0, ttft_s=3.0).met(rows) is met
