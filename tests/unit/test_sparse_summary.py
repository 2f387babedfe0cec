"""Reports of ranks and steps, pooled to what a client is told."""

import math

import pytest

from csps.coordinator.sparse import SparseSummary
from csps.core.attention import CONFIDENCE_Z, AttentionParams, CsaConfig, HeadReport, SparseReport
from csps.core.errors import ConfigError, InvalidRequestError


def head(
    gamma: float, probes: int, mean: float, var: float = 0.0, lowest: float = 0.5
) -> HeadReport:
    return HeadReport(0, 0, gamma, 0.3, probes, mean, var, 0.8, lowest)


def test_ranks_and_steps_add_up() -> None:
    summary = SparseSummary()
    first = (head(0.9, 30, 0.92, var=1e-4), head(1.0, 30, 1.0, lowest=1.0))
    second = (head(0.975, 10, 0.96, var=4e-4, lowest=0.4),)
    summary.add(
        [SparseReport(7, 10, 40, 3, 20, 0.8, first), SparseReport(7, 20, 60, 5, 20, 0.8)], 0.9
    )
    summary.add([SparseReport(7, 30, 100, 2, 10, 0.7, second)], 0.9)
    report = summary.to_proto()
    assert report.density == pytest.approx(60 / 200)
    assert report.union_density == pytest.approx(10 / 50)
    assert report.num_probes == 70
    assert report.recall_mean == pytest.approx((30 * 0.92 + 30 * 1.0 + 10 * 0.96) / 70)
    spread = CONFIDENCE_Z * math.sqrt(30**2 * 1e-4 + 10**2 * 4e-4) / 70
    assert report.recall_low == pytest.approx(report.recall_mean - spread)
    assert report.recall_high == pytest.approx(min(report.recall_mean + spread, 1.0))
    assert report.recall_p5 == pytest.approx(0.7)
    assert report.recall_min == pytest.approx(0.4)
    assert (report.dense_share, report.widened_share) == pytest.approx((1 / 3, 1 / 3))
    assert not report.heads


def test_heads_are_kept_on_request_and_gamma_1_is_no_fallback() -> None:
    summary = SparseSummary(keep_heads=True)
    summary.add([SparseReport(7, 4, 4, 0, 0, 1.0, (head(1.0, 5, 1.0),))], 1.0)
    report = summary.to_proto()
    assert len(report.heads) == 1
    assert (report.dense_share, report.union_density) == (0, 0)


def test_requests_pool_since_start() -> None:
    total, one = SparseSummary(), SparseSummary()
    one.add([SparseReport(1, 1, 4, 1, 2, 0.9, (head(0.9, 10, 0.9),))], 0.9)
    total.merge(one)
    total.merge(one)
    assert total.to_proto().num_probes == 20
    assert total.to_proto().density == one.to_proto().density


def test_the_interval_widens_where_probes_are_few() -> None:
    few, many = (head(0.9, count, 0.9, var=1e-4) for count in (8, 1000))
    assert few.recall_high - few.recall_low == pytest.approx(2 * 2.365 * 0.01, rel=0.01)
    assert many.recall_high - many.recall_low == pytest.approx(2 * 1.96 * 0.01, rel=0.01)


@pytest.mark.parametrize("gamma", [0.0, -1.0, 1.01, math.nan, math.inf])
def test_gamma_out_of_limits(gamma: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"^attention\.gamma: must be in"):
        AttentionParams(gamma=gamma).validate()


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"min_recall": 1.5}, "--csa-min-recall"),
        ({"min_recall_p5": -0.1}, "--csa-min-recall-p5"),
        ({"max_density": 0.0}, "--csa-max-density"),
        ({"rows_per_tile": 0}, "--csa-rows"),
        ({"rows_per_tile": 65}, "--csa-rows"),
    ],
)
def test_settings_out_of_limits_name_their_flag(settings: dict[str, float], flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}: must be in"):
        CsaConfig(**settings).validate()
