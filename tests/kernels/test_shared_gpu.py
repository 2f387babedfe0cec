"""Ranks that share a GPU, and so send by way of the host: what one rank would answer.

Without a GPU they share the CPU, and are told to send so.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from csps.core.attention import AttentionKind, AttentionParams
from csps.core.config import AttentionBackend
from csps.core.plan import Layout
from csps.core.request import SamplingParams
from csps.core.strategy import Placement
from tests.checkpoints import write_tiny
from tests.dist.ranks import Job, Request, run_ranks, serve

IN_TURN = (Layout.SP, Layout.TP)
# All blocks are chosen, by the messages that a sparse prefill takes.
ALL_BLOCKS = AttentionParams(AttentionKind.CSA, gamma=1.0)


@pytest.mark.parametrize("placement", list(Placement))
def test_equal_to_one_rank(
    placement: Placement, tmp_path: Path, device: torch.device, monkeypatch
) -> None:
    on_gpu = device.type == "cuda"
    if on_gpu:  # of several GPUs, one
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", first)
    model = write_tiny("llama", tmp_path, num_hidden_layers=2)
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, 160, (n,), generator=generator).tolist()) for n in (7, 150)]
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    requests = [Request(prompt, sampling) for prompt in prompts]
    if placement is Placement.TOKENS:
        requests.append(Request(prompts[1], sampling, attention=ALL_BLOCKS))
    job = Job(
        model,
        tuple(requests),
        block_size=16,
        stage_tokens=96,
        # On GPUs torch's has no fp32.
        attention_backend=AttentionBackend.TRITON if on_gpu else AttentionBackend.TORCH,
        placement=placement,
        layouts=IN_TURN if placement is Placement.HEADS else (Layout.SP,),
        decode_layouts=IN_TURN,
        device=device.type,
    )
    (alone,) = run_ranks(1, serve, job)
    for outcome in run_ranks(2, serve, replace(job, staged=not on_gpu)):
        assert outcome.outputs == alone.outputs
