"""Sparse prefill on real ranks: exact where it must be, the same on any number of ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from csps.core.attention import AttentionKind, AttentionParams, CsaConfig, Estimate, Wire
from tests.dist.sparse_case import Answer, Case, answers, dense, gather, random_case

EXACT = AttentionParams(AttentionKind.CSA, gamma=1.0)
SPARSE = AttentionParams(AttentionKind.CSA, gamma=0.6, seed=7)
# So that a low gamma is not corrected away.
LENIENT = CsaConfig(min_recall=0.0, min_recall_p5=0.0, max_density=1.0)
LENGTHS = [1, 7, 16, 17, 31, 33, 160, 333]


def close(o, expected) -> None:
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_gamma_1_is_dense_in_every_layer(num_ranks: int) -> None:
    """At one block, at an edge, a token over it, odd lengths; whole and in stages."""
    cases = [random_case(n, params=EXACT) for n in LENGTHS]
    cases += [
        random_case(333, params=EXACT, stage_tokens=64),
        random_case(333, params=EXACT, stage_tokens=64, config=CsaConfig(pipeline=False)),
        # The last stage is a few tiles against many blocks: their queries travel.
        random_case(16 * 16 * 2 + 48, params=EXACT, stage_tokens=512),
    ]
    for case, found in zip(cases, answers(num_ranks, *cases), strict=True):
        close(gather(found), dense(case))


def summary(found: list[Answer]) -> tuple[int, int, list]:
    """What was kept and recalled, which must not depend on the ranks."""
    reports = [report for answer in found for report in answer.reports]
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


def test_any_number_of_ranks_keeps_the_same() -> None:
    cases = [
        random_case(
            777,
            params=replace(SPARSE, kind=kind, window_blocks=2),
            config=replace(LENIENT, estimate=estimate),
            stage_tokens=512,
        )
        for kind in (AttentionKind.CSA, AttentionKind.CSA_DISTANCE)
        for estimate in Estimate
    ]
    ones = answers(1, *cases)
    for found in ones:
        kept, causal, _ = summary(found)
        assert kept < 0.7 * causal
    for num_ranks in (2, 4):
        for found, one in zip(answers(num_ranks, *cases), ones, strict=True):
            assert summary(found) == summary(one)
            close(gather(found), gather(one))


def test_how_it_runs_changes_nothing() -> None:
    """Threads share the items out; without the pipeline the same is sent."""
    case = random_case(600, params=SPARSE, config=LENIENT)
    threads = replace(case, num_threads=3)
    off = replace(case, config=replace(LENIENT, pipeline=False))
    one, shared, eager = answers(3, case, threads, off)
    torch.testing.assert_close(gather(shared), gather(one), rtol=0, atol=0)
    torch.testing.assert_close(gather(eager), gather(one), rtol=0, atol=0)
    assert [answer.bytes_sent for answer in eager] == [answer.bytes_sent for answer in one]


def test_bytes() -> None:
    """What is sent is received; int8 on the wire is close and smaller."""
    case = random_case(600, params=SPARSE, config=LENIENT)
    exact, int8 = answers(3, case, replace(case, config=replace(LENIENT, wire=Wire.INT8)))
    for kind in ("rows", "lse", "mass", "vote", "bitmap", "kv", "query", "partial"):
        sent = sum(answer.bytes_sent[kind] for answer in exact)
        assert sent == sum(answer.bytes_received[kind] for answer in exact) > 0
    error = (gather(int8) - gather(exact)).norm() / gather(exact).norm()
    assert 0 < error < 0.01
    # 32 numbers of 4 bytes become 32 of 1 and a scale of 2.
    kv = [sum(answer.bytes_sent["kv"] for answer in found) for found in (int8, exact)]
    assert kv[0] * 128 == kv[1] * 34


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


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_choice_that_cannot_work_falls_back_to_dense(num_ranks: int) -> None:
    few_rows = CsaConfig(rows_per_tile=1)
    cases = [uniform_case(), replace(hot_case(), config=few_rows)]
    for case, found in zip(cases, answers(num_ranks, *cases), strict=True):
        heads = [head for answer in found for report in answer.reports for head in report.heads]
        assert len(heads) == 4
        assert all(head.gamma == 1.0 for head in heads)
        close(gather(found), dense(case))


def test_without_the_fallback_the_probes_tell() -> None:
    case = replace(hot_case(), params=SPARSE, config=LENIENT)
    ((answer,),) = answers(1, case)
    for head in answer.reports[0].heads:
        assert head.gamma < 1.0
        assert head.recall_mean < 0.9
    assert np.isfinite(answer.o).all()


def test_mass_in_the_middle_is_found() -> None:
    case = middle_case()
    (found,) = answers(2, case)
    heads = [head for answer in found for report in answer.reports for head in report.heads]
    assert all(head.recall_low >= 0.9 for head in heads)
    error = (gather(found) - dense(case)).norm() / dense(case).norm()
    assert error < 0.1


def test_extreme_scores_are_never_nan() -> None:
    case = random_case(400, params=SPARSE, config=LENIENT)
    cases = [replace(case, q=scale * case.q) for scale in (0.0, 1e-30, 1e4)]
    for found in answers(2, *cases):
        assert torch.isfinite(gather(found)).all()
