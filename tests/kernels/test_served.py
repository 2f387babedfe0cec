"""Prompts served on the Triton kernels: what torch's answer on a CPU, dense and sparse.

Without a GPU they are interpreted. Ranks are processes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csps.core.attention import AttentionKind, AttentionParams, CsaConfig
from csps.core.config import AttentionBackend
from csps.core.plan import Layout
from csps.core.request import SamplingParams
from csps.core.strategy import Placement
from tests.checkpoints import write_tiny
from tests.dist.ranks import Job, Request, run_ranks, serve

SPARSE = AttentionParams(AttentionKind.CSA, gamma=0.6, seed=7)
# So that a low gamma is not corrected away.
LENIENT = CsaConfig(min_recall=0.0, min_recall_p5=0.0, max_density=1.0)


@pytest.fixture
def on_triton(device, monkeypatch) -> dict[str, Any]:
    """What of a Job chooses them."""
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return {"attention_backend": AttentionBackend.TRITON, "device": device.type}


def test_equal_to_torch(tmp_path: Path, on_triton: dict[str, Any]) -> None:
    """On 2 ranks: same tokens, and K and V of all layers, which follow from the attention."""
    model = write_tiny("llama", tmp_path, num_hidden_layers=2)
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, 160, (n,), generator=generator).tolist()) for n in (7, 150)]
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    requests = (
        Request(prompts[0], sampling),
        Request(prompts[1], sampling),
        Request(prompts[1], sampling, attention=SPARSE),
    )
    job = Job(
        model,
        requests,
        block_size=16,
        stage_tokens=512,
        csa=LENIENT,
        attention_backend=AttentionBackend.TORCH,
    )
    by_backend = [run_ranks(2, serve, one) for one in (job, replace(job, **on_triton))]
    for torch_rank, triton_rank in zip(*by_backend, strict=True):
        assert triton_rank.outputs == torch_rank.outputs
        np.testing.assert_allclose(triton_rank.kv, torch_rank.kv, rtol=1e-3, atol=1e-4)
        (report, *_) = [r for result in torch_rank.results for r in result.sparse]
        assert report.kept_pairs < report.causal_pairs


def test_decode_in_buckets(tmp_path: Path, on_triton: dict[str, Any]) -> None:
    """On one rank, on a GPU as CUDA graphs, without one as these would run: torch's tokens."""
    model = write_tiny("llama", tmp_path, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(1)
    requests = tuple(
        Request(
            tuple(torch.randint(3, 160, (length,), generator=generator).tolist()),
            SamplingParams(max_tokens=4 + 2 * i, ignore_eos=True),
            start_step=3 * i,
        )
        for i, length in enumerate((30, 3, 15))
    )
    job = Job(model, requests, block_size=16, attention_backend=AttentionBackend.TORCH)
    (plain,) = run_ranks(1, serve, job)
    buckets = () if on_triton["device"] == "cuda" else (2, 4)
    (bucketed,) = run_ranks(1, serve, replace(job, **on_triton, buckets=buckets))
    assert bucketed.outputs == plain.outputs
    assert bucketed.num_bucketed >= 8


@pytest.mark.parametrize("buckets", [(), (2, 4)])
@pytest.mark.parametrize("placement", Placement)
def test_exchanges_of_heads(
    tmp_path: Path, monkeypatch, placement: Placement, buckets: tuple[int, ...]
) -> None:
    """Helix (KV by token) and Ulysses (by head) on 2 ranks that have unequal numbers of heads."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = write_tiny("llama", tmp_path, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(2)
    requests = tuple(
        Request(
            tuple(torch.randint(3, 160, (length,), generator=generator).tolist()),
            SamplingParams(max_tokens=4, ignore_eos=True),
            start_step=i,
        )
        for i, length in enumerate((40, 3, 17))
    )
    job = Job(
        model,
        requests,
        block_size=16,
        placement=placement,
        decode_layouts=(Layout.TP,),
        attention_backend=AttentionBackend.TORCH,
    )
    torch_ranks = run_ranks(2, serve, job)
    triton_job = replace(job, attention_backend=AttentionBackend.TRITON, buckets=buckets)
    for found, expected in zip(run_ranks(2, serve, triton_job), torch_ranks, strict=True):
        assert found.outputs == expected.outputs
        assert bool(found.num_bucketed) == bool(buckets)
        kind = "partial" if placement is Placement.TOKENS else "ulysses"
        assert any(result.stats.bytes_sent.get(kind) for result in found.results)
