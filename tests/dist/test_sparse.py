"""Sparse prefill on real ranks: exact where it must be, the same on any number of ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from csps.core.attention import AttentionKind, AttentionParams, CsaConfig, Estimate, Wire
from tests.dist.ranks import run_ranks
from tests.dist.sparse_case import Case, attend, dense, gather, random_case

EXACT = AttentionParams(AttentionKind.CSA, gamma=1.0)
SPARSE = AttentionParams(AttentionKind.CSA, gamma=0.6, seed=7)
# So that a low gamma is not corrected away.
LENIENT = CsaConfig(min_recall=0.0, min_recall_p5=0.0, max_density=1.0)
LENGTHS = [1, 7, 16, 17, 31, 33, 160, 333]


def close(o, expected) -> None:
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_tokens", [17, 333])
def test_gamma_1_is_dense_in_every_layer(num_tokens: int, num_ranks: int) -> None:
    case = random_case(num_tokens, params=EXACT)
    close(gather(run_ranks(num_ranks, attend, case)), dense(case))


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_gamma_1_is_dense_at_any_length(num_tokens: int) -> None:
    """One block, an edge, one token over it; in stages; with the pipeline off."""
    config = CsaConfig(pipeline=False)
    case = random_case(num_tokens, params=EXACT, stage_tokens=64, config=config)
    close(gather(run_ranks(2, attend, case)), dense(case))


def summary(answers) -> tuple[int, int, list]:
    """What was kept and recalled, which must not depend on the ranks."""
    reports = [report for answer in answers for report in answer.reports]
    heads = sorted(
        (head.layer, head.head, head.density, round(head.recall_mean, 4))
        for report in reports
        for head in report.heads
    )
    return (
        sum(report.kept_pairs for report in reports),
        sum(report.causal_pairs for report in reports),
        heads,
    )


@pytest.mark.parametrize("estimate", list(Estimate))
@pytest.mark.parametrize("kind", [AttentionKind.CSA, AttentionKind.CSA_DISTANCE])
def test_any_number_of_ranks_keeps_the_same(kind: AttentionKind, estimate: Estimate) -> None:
    case = random_case(
        777,
        params=replace(SPARSE, kind=kind, window_blocks=2),
        config=replace(LENIENT, estimate=estimate),
        stage_tokens=512,
    )
    one = run_ranks(1, attend, case)
    kept, causal, heads = summary(one)
    assert kept < 0.7 * causal
    for num_ranks in (2, 4):
        answers = run_ranks(num_ranks, attend, case)
        assert summary(answers) == (kept, causal, heads)
        close(gather(answers), gather(one))


def test_threads_share_the_items_out() -> None:
    case = random_case(600, params=SPARSE, config=LENIENT)
    one = run_ranks(1, attend, case)
    close(gather(run_ranks(1, attend, replace(case, num_threads=3))), gather(one))


def test_pipeline_off_changes_nothing() -> None:
    case = random_case(600, params=SPARSE, config=LENIENT)
    on, off = (
        run_ranks(3, attend, replace(case, config=replace(LENIENT, pipeline=pipeline)))
        for pipeline in (True, False)
    )
    torch.testing.assert_close(gather(on), gather(off), rtol=0, atol=0)
    assert [answer.bytes_sent for answer in on] == [answer.bytes_sent for answer in off]


def test_int8_wire_is_close_and_smaller() -> None:
    case = random_case(600, params=SPARSE, config=LENIENT)
    exact = run_ranks(2, attend, case)
    int8 = run_ranks(2, attend, replace(case, config=replace(LENIENT, wire=Wire.INT8)))
    error = (gather(int8) - gather(exact)).norm() / gather(exact).norm()
    assert 0 < error < 0.01
    # 32 numbers of 4 bytes become 32 of 1 and a scale of 2.
    assert sum(a.bytes_sent["kv"] for a in int8) * 128 == sum(a.bytes_sent["kv"] for a in exact) * 34


def test_what_is_sent_is_received() -> None:
    answers = run_ranks(3, attend, random_case(600, params=SPARSE, config=LENIENT))
    for kind in ("rows", "lse", "mass", "vote", "bitmap", "kv", "query", "partial"):
        sent = sum(answer.bytes_sent[kind] for answer in answers)
        assert sent == sum(answer.bytes_received[kind] for answer in answers) > 0


def test_a_short_last_stage_ships_its_queries() -> None:
    """One tile of queries against many blocks: moving q is less than moving KV."""
    case = random_case(16 * 16 * 2 + 48, params=EXACT, stage_tokens=512)
    answers = run_ranks(2, attend, case)
    close(gather(answers), dense(case))
    shipped = sum(answer.bytes_sent["partial"] for answer in answers)
    last_tile = 2 * 6 * 16 * (32 * 4 + 4)  # layers x heads x rows x (o, lse)
    assert shipped > last_tile


# Selections that go wrong on purpose


def uniform_case() -> Case:
    case = random_case(640)
    return replace(case, q=torch.zeros_like(case.q))


def hot_case() -> Case:
    """Every row looks at one block of its own, far away: no other row can tell which."""
    case = random_case(640)
    generator = torch.Generator().manual_seed(3)
    k = torch.randn(case.k.shape, generator=generator)
    q = torch.zeros_like(case.q)
    for position in range(64, 640):
        target = int(torch.randint(16, position - 32, (1,), generator=generator))
        q[:, position] = 12.0 * k[:, target].repeat_interleave(3, dim=1)
    return replace(case, q=q, k=k)


def middle_case() -> Case:
    """All mass in one block in the middle, later than half of the tiles."""
    case = random_case(640)
    k = 0.1 * case.k
    k[:, 320:336] += 1.0
    return replace(case, q=torch.ones_like(case.q), k=k)


@pytest.mark.parametrize("make", [uniform_case, hot_case])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_choice_that_cannot_work_falls_back_to_dense(make, num_ranks: int) -> None:
    case = make()
    answers = run_ranks(num_ranks, attend, case)
    heads = [head for answer in answers for report in answer.reports for head in report.heads]
    assert len(heads) == 4
    assert all(head.gamma == 1.0 for head in heads)
    close(gather(answers), dense(case))


def test_without_the_fallback_the_probes_tell() -> None:
    case = replace(hot_case(), params=SPARSE, config=LENIENT)
    (answer,) = run_ranks(1, attend, case)
    for head in answer.reports[0].heads:
        assert head.gamma < 1.0
        assert head.recall_mean < 0.9
    assert np.isfinite(answer.o).all()


def test_mass_in_the_middle_is_found() -> None:
    case = middle_case()
    answers = run_ranks(2, attend, case)
    heads = [head for answer in answers for report in answer.reports for head in report.heads]
    assert all(head.recall_low >= 0.9 for head in heads)
    torch.testing.assert_close(gather(answers), dense(case), rtol=0.2, atol=0.2)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4])
def test_extreme_scores_are_never_nan(scale: float) -> None:
    case = random_case(400, params=SPARSE, config=LENIENT)
    answers = run_ranks(2, attend, replace(case, q=scale * case.q))
    assert torch.isfinite(gather(answers)).all()
