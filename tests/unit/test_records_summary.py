"""Figures of runs small enough to be worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csps.core.plan import Lane, Layout
from csps.percentiles import percentile
from csps.records.rows import SUMMARY_FILE, Status
from csps.records.spread import nearest_rank, spread
from csps.records.steps import NUM_BINS, StepDigest
from csps.records.summary import summarize, write_summary
from tests.unit.record_rows import RUN, request, step, write_folder

UNFINISHED, FAILED = Status.UNFINISHED, Status.FAILED
values = st.lists(st.integers(0, 1000).map(float), min_size=1)


@settings(deadline=None)
@given(values, st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_percentiles_are_those_of_csps(found: list[float], share: float):
    assert nearest_rank(np.sort(found), share) == percentile(found, share)


@settings(deadline=None)
@given(values, values, st.integers(0, 1000))
def test_figures_not_named_at_least_stay_when_what_had_not_ended_takes_longer(
    exact: list[float], bounds: list[float], longer: int
):
    now, then = spread(exact, bounds), spread(exact, [bound + longer for bound in bounds])
    for name in ("mean", "p50", "p90", "p99", "max"):
        if name in now["at_least"]:
            assert then[name] >= now[name]
        else:
            assert then[name] == now[name]


def test_nothing_has_no_figures():
    assert spread(())["p99"] is None
    summary = summarize(RUN, [])
    assert summary["latency"]["ttft_s"]["count"] == 0
    assert summary["throughput"]["decode_tok_s"] is None
    assert summary["steps"] is None


def test_latencies_by_hand():
    rows = [
        request("a"),
        request("b", sent_s=2.0, response_s=3.0, ttft_s=2.0, gaps_ms=(500.0, 500.0), queue_s=1.5),
    ]
    latency = summarize(RUN, rows)["latency"]
    assert latency["ttft_s"]["mean"] == 1.5
    assert latency["ttft_s"]["p50"] == 1.0
    assert latency["ttft_s"]["p90"] == 2.0
    assert latency["tbt_ms"]["count"] == 4
    assert latency["tbt_ms"]["mean"] == 350.0
    assert latency["tbt_ms"]["p50"] == 300.0
    assert latency["worst_gap_ms"]["mean"] == 400.0
    assert latency["response_s"]["mean"] == pytest.approx(2.2)
    assert latency["normalized_s"]["max"] == 1.0
    assert latency["queue_s"]["mean"] == 1.0
    assert latency["ttft_s"]["at_least"] == []


def test_what_had_not_ended_counts_with_what_it_had_waited():
    queued = request(
        "queued", status=UNFINISHED, ttft_s=None, queue_s=None, gaps_ms=(), output_tokens=0,
        response_s=8.0,
    )  # fmt: skip
    stalled = request("stalled", status=UNFINISHED, gaps_ms=(100.0,), output_tokens=2,
                      response_s=7.1)  # fmt: skip
    latency = summarize(RUN, [request(), queued, stalled])["latency"]
    assert latency["ttft_s"]["max"] == 8.0
    assert latency["ttft_s"]["lower_bounds"] == 1
    assert latency["ttft_s"]["p50"] == 1.0
    assert latency["ttft_s"]["at_least"] == ["mean", "p90", "p99", "max"]
    assert latency["tbt_ms"]["max"] == pytest.approx(6000.0)  # 7.1 s - 1 s - 0.1 s
    assert latency["worst_gap_ms"]["lower_bounds"] == 1
    assert latency["response_s"]["lower_bounds"] == 2
    assert latency["normalized_s"]["max"] == pytest.approx(8.0 / 3)  # of the 3 tokens it was to get
    assert latency["queue_s"]["max"] == 8.0


def test_failures_are_in_no_latency_and_counted_by_their_text():
    bad = request("x", status=FAILED, error="too long", ttft_s=9.0, response_s=0.1)
    summary = summarize(RUN, [request(), bad, replace(bad, request_id="y"), replace(bad, error="")])
    assert summary["failures"] == {"too long": 2, "no reason given": 1}
    assert summary["requests"] == {"count": 4, "done": 1, "failed": 3, "unfinished": 0}
    assert summary["latency"]["ttft_s"]["count"] == 1


def test_throughput_counts_prompts_with_a_first_token():
    rows = [
        request("a", cached_tokens=40, sent_s=1.0),
        request("b", status=UNFINISHED, ttft_s=None, gaps_ms=(), output_tokens=0, sent_s=1.0,
                response_s=10.0),
    ]  # fmt: skip
    summary = summarize(RUN, rows)
    assert summary["makespan_s"] == 10.0
    assert summary["throughput"] == {
        "prefill_tok_s": 10.0,
        "prefill_uncached_tok_s": 6.0,
        "decode_tok_s": 0.3,
        "done_req_s": 0.1,
    }
    assert summary["cache"] == {"cached_tokens": 40, "hit_share": 0.4}


def test_goodput_wants_both_objectives_of_each_request():
    rows = [
        request("good", sent_s=8.6),
        request("late", ttft_s=2.5),
        request("stalls", gaps_ms=(10.0, 900.0)),
        request("failed", status=FAILED, error="x"),
        request("left", status=UNFINISHED),
    ]
    summary = summarize(replace(RUN, slo_ttft_s=2.0, slo_tbt_ms=300.0), rows)
    assert summary["makespan_s"] == 10.0
    assert summary["slo"] == {
        "ttft_s": 2.0,
        "tbt_ms": 300.0,
        "goodput_req_s": 0.1,
        "attained_share": 0.2,
        "ttft_share": 0.4,
        "tbt_share": 0.4,
    }
    one = summarize(replace(RUN, slo_tbt_ms=300.0), rows)["slo"]
    assert one["attained_share"] == 0.4
    assert one["ttft_share"] is None
    assert summarize(RUN, rows)["slo"]["goodput_req_s"] is None


def test_ttft_by_prompt_in_powers_of_two():
    lengths = (100, 127, 128, 4096)
    rows = [request(str(n), prompt_tokens=n, ttft_s=n / 100) for n in lengths]
    buckets = summarize(RUN, rows)["ttft_by_prompt"]
    assert [(b["from_tokens"], b["below_tokens"], b["count"]) for b in buckets] == [
        (64, 128, 2), (128, 256, 1), (4096, 8192, 1),
    ]  # fmt: skip
    assert buckets[0]["p50"] == 1.0
    assert buckets[0]["p99"] == 1.27


def test_sums_over_steps():
    decode = step(
        lane=Lane.DECODE, layout=Layout.TP, num_tokens=4, started_s=0.5, ended_s=1.5,
        bytes_sent={"q": 50}, dense_bytes=None, predicted_s={Layout.TP: 0.5}, density=None,
        recall=None, kv_pages=(80, 3),
    )  # fmt: skip
    # Sent while the one before it ran: the lane is busy from 0 to 2.
    overlapping = step(1, started_s=0.8, ended_s=2.0, density=0.8, recall=0.9)
    steps = summarize(RUN, [request()], [step(), decode, overlapping])["steps"]
    prefill = steps["lanes"]["prefill"]
    assert prefill["busy_s"] == 2.0
    assert prefill["tokens_per_busy_s"] == 100.0
    assert prefill["compute_s"] == 3.0
    assert prefill["exposed_share"] == pytest.approx(0.8 / 3.8)
    assert prefill["bytes_against_dense"] == 0.5
    assert steps["lanes"]["decode"]["dense_bytes"] is None
    assert steps["bytes_by_kind"] == {"kv": 800, "outputs": 200, "q": 50}
    assert steps["bytes_against_dense"] == 0.5
    assert steps["density"] == pytest.approx(0.6)
    assert steps["recall"] == {"mean": pytest.approx(0.94), "min": 0.9}
    assert steps["prediction_error"]["sp"]["bias"] == pytest.approx(0.1)
    assert steps["prediction_error"]["tp"]["mean"] == pytest.approx(0.5)
    assert steps["kv_share_max"] == 0.8


def test_replicas_have_lanes_and_pages_of_their_own():
    digest = StepDigest(RUN).take([step(), step(replica=1, ended_s=2.0, kv_pages=(9, 9))])
    assert digest.lanes[Lane.PREFILL].busy_s == 3.0
    assert digest.occupancy[0, 0][NUM_BINS // 10] == 0.04
    assert digest.occupancy[1, 0][NUM_BINS // 5] == 0.09


def test_the_summary_is_written_beside_the_records(tmp_path: Path):
    folder = write_folder(tmp_path / "run", RUN, [request()], [step()])
    summary = write_summary(folder)
    assert json.loads((folder / SUMMARY_FILE).read_text()) == summary
    assert "lower_bounds" in summary["notes"]
