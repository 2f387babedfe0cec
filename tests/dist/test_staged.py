"""Transfers by way of the host, which ranks that share a GPU need; here the device is a CPU too."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from csps.core.attention import AttentionKind, AttentionParams, CsaConfig
from csps.core.config import WorkerSetup
from csps.core.plan import Lane, Layout
from csps.core.strategy import Placement
from csps.parallel.collectives import SequenceComm, TensorComm
from csps.parallel.overlap import CommClock
from csps.worker.place import Place, connect_ranks
from tests.checkpoints import write_tiny
from tests.dist.ranks import Job, Outcome, Request, run_ranks, serve
from tests.dist.test_parity import check, greedy, prompts, sampling

IN_TURN = (Layout.SP, Layout.TP)
SPARSE = AttentionParams(AttentionKind.CSA, gamma=0.6, seed=7)
# So that a low gamma is not corrected away.
LENIENT = CsaConfig(min_recall=0.0, min_recall_p5=0.0, max_density=1.0)
LARGE = 8 << 20  # bytes: more than sockets hold, so that nothing is sent before it is received


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


def sent(outcome: Outcome) -> list[dict[str, int]]:
    """Bytes by kind, of each step."""
    return [result.stats.bytes_sent for result in outcome.results]


def serve_both_ways(job: Job) -> list[Outcome]:
    """On two ranks: what is drawn, kept and counted does not depend on the way of the bytes."""
    plain = run_ranks(2, serve, job)
    staged = run_ranks(2, serve, replace(job, staged=True))
    for ours, theirs in zip(staged, plain, strict=True):
        assert ours.outputs == theirs.outputs
        np.testing.assert_array_equal(ours.kv, theirs.kv)
        assert sent(ours) == sent(theirs)
        for result in ours.results:
            stats = result.stats
            assert stats.wall_s >= stats.exposed_comm_s
            assert stats.comm_s >= stats.exposed_comm_s >= 0.0
            assert (stats.exposed_comm_s > 0.0) == bool(stats.bytes_sent or stats.bytes_received)
    return staged


def test_kv_by_tokens(llama: Path) -> None:
    """The ring, pass-Q, sparse prefill, and decode in both layouts."""
    texts = prompts((200, 3, 150, 330))
    requests = tuple(Request(text, sampling(12), start_step=i) for i, text in enumerate(texts))
    sparse = Request(texts[3], sampling(12), attention=SPARSE)
    job = Job(
        llama, (*requests, sparse), stage_tokens=96, csa=LENIENT, block_size=16,
        decode_layouts=IN_TURN,
    )  # fmt: skip
    outcomes = serve_both_ways(job)
    for outcome in outcomes:
        assert outcome.outputs[:4] == tuple(greedy(llama, text, 12) for text in texts)
    kinds = sum((Counter(step) for outcome in outcomes for step in sent(outcome)), Counter())
    ring, shipped, chosen = {"kv"}, {"query", "partial"}, {"rows", "lse", "mass", "vote", "bitmap"}
    assert set(kinds) >= ring | shipped | chosen | {"hidden", "logits"}


def test_kv_by_heads(llama: Path) -> None:
    texts = prompts((1, 17, 130))
    requests = tuple(Request(text, sampling(12), start_step=i) for i, text in enumerate(texts))
    job = Job(llama, requests, placement=Placement.HEADS, layouts=IN_TURN)
    outcomes = serve_both_ways(job)
    check(outcomes, [greedy(llama, text, 12) for text in texts])
    kinds = sum((Counter(step) for step in sent(outcomes[0])), Counter())
    assert set(kinds) >= {"ulysses", "hidden"}


def test_tensors_are_touched_by_their_own_rank_alone() -> None:
    """What leaves is read when it is posted, what comes is written when it is waited for."""
    run_ranks(2, touch)


def touch(place: Place) -> None:
    setup = WorkerSetup("", tp=1, collective_timeout_s=30.0)
    mesh = connect_ranks(setup, place, torch.device("cpu"), shares="the same")
    clock = CommClock()
    comm = SequenceComm(mesh, Lane.PREFILL, clock)
    peer = 1 - place.rank
    with torch.inference_mode():
        first, incoming, behind = torch.zeros(3, LARGE, dtype=torch.uint8)
        if place.rank:
            comm.exchange("query", {0: numbers(1)}, {})  # nobody waits for it
        else:
            comm.exchange("query", {}, {1: first}).wait()
            assert torch.equal(first, numbers(1))
        outgoing = numbers(place.rank)
        handle = comm.ring_shift("kv", outgoing, incoming)
        outgoing.zero_()
        comm.exchange("partial", {peer: numbers(place.rank)}, {peer: behind}).wait()
        assert torch.equal(behind, numbers(peer))
        assert not incoming.any()  # though it came before
        handle.wait()
        assert torch.equal(incoming, numbers(peer))
        reduce(mesh.lanes[Lane.PREFILL].all, place.rank, clock)
    assert clock.bytes_sent["kv"] == clock.bytes_received["kv"] == LARGE
    clock.settle()
    assert clock.comm_s >= clock.exposed_s > 0.0
    comm.close()
    dist.destroy_process_group()


def reduce(group: dist.ProcessGroup | None, rank: int, clock: CommClock) -> None:
    comm = TensorComm(group, rank, 2, clock, staged=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        partial = torch.full((3, 5), 1.0 + rank, dtype=dtype)
        handle = comm.all_reduce(partial)
        dist.barrier(group)
        assert (partial == 1.0 + rank).all()
        handle.wait()
        assert (partial == 3.0).all()
    whole = comm.gather_columns(torch.full((2, 1), float(rank)))
    assert (whole is None) if rank else torch.equal(whole, torch.tensor([[0.0, 1.0]] * 2))


def numbers(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(1, 256, (LARGE,), dtype=torch.uint8, generator=generator)
