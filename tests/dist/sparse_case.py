"""Sparse prefill of made-up queries and keys on real ranks, beside dense attention.

Suffixes as in csps.attention: S tokens, H query heads, K KV heads, D head dim.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from csps.attention.backends.torch_cpu import cpu_kernels
from csps.attention.prefill import PrefillAttention
from csps.attention.transfer import KVShape
from csps.core.attention import AttentionKind, AttentionParams, CsaConfig, SparseReport
from csps.core.config import DType, WorkerSetup
from csps.core.plan import Lane, StepPlan, Work
from csps.core.shards import num_blocks, prefill_stages, zigzag
from csps.engine.batch import prefill_batch
from csps.engine.block_table import BlockTable
from csps.engine.kv_pool import KVPool
from csps.parallel.collectives import SequenceComm
from csps.parallel.mesh import Mesh
from csps.parallel.overlap import CommClock
from csps.sched.ledger import Ledger
from csps.worker.place import Place, connect_ranks
from tests.dist.ranks import run_ranks

NUM_PAGES = 400


@dataclass(frozen=True)
class Case:
    """One prompt, its queries and keys [layers, S, heads, D], prefilled in stages."""

    q: Tensor
    k: Tensor
    v: Tensor
    params: AttentionParams = field(default_factory=lambda: AttentionParams(AttentionKind.CSA))
    config: CsaConfig = field(default_factory=CsaConfig)
    block_size: int = 16
    stage_tokens: int = 1 << 20
    num_threads: int = 1


@dataclass(frozen=True)
class Answer:
    """One rank's rows (positions and o [layers, T, H, D]), and its reports by stage."""

    positions: np.ndarray
    o: np.ndarray  # a tensor would have to be fetched from a process that may have ended
    reports: tuple[SparseReport, ...]
    bytes_received: dict[str, int]
    bytes_sent: dict[str, int]


def random_case(num_tokens: int, seed: int = 0, **settings: object) -> Case:
    """Two layers of 6 query and 2 KV heads; keys with a structure worth being sparse about."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = (
        normal(2, num_tokens, 6, 32),
        normal(2, num_tokens, 2, 32),
        normal(2, num_tokens, 2, 32),
    )
    # Neighbours share a direction, which later queries point to: some blocks matter, most do not.
    topics = normal(2, num_tokens // 40 + 1, 2, 32)
    topic = torch.arange(num_tokens) // 40
    k += topics[:, topic]
    wanted = (topic * torch.rand(num_tokens, generator=generator)).long()
    q += 2.0 * topics[:, wanted].repeat_interleave(3, dim=2)
    return Case(q, k, v, **settings)  # type: ignore[arg-type]


def dense(case: Case) -> Tensor:
    """Causal attention in fp64: [layers, S, H, D]."""
    group = case.q.shape[2] // case.k.shape[2]
    k, v = (x.double().repeat_interleave(group, dim=2) for x in (case.k, case.v))
    scores = torch.einsum("lshd,lthd->lhst", case.q.double(), k) / case.q.shape[3] ** 0.5
    later = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    probabilities = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("lhst,lthd->lshd", probabilities, v).float()


def answers(num_ranks: int, *cases: Case) -> list[list[Answer]]:
    """Every case on so many ranks: its answers by rank."""
    by_rank = run_ranks(num_ranks, attend_all, cases)
    return [[rank[index] for rank in by_rank] for index in range(len(cases))]


def attend_all(place: Place, cases: tuple[Case, ...]) -> list[Answer]:
    """Prefill the cases on this rank, one after the other."""
    setup = WorkerSetup("", dtype=DType.FLOAT32, collective_timeout_s=60.0)
    mesh = connect_ranks(setup, place, torch.device("cpu"))
    found = [attend(mesh, case) for case in cases]
    dist.destroy_process_group()
    return found


def attend(mesh: Mesh, case: Case) -> Answer:
    """Prefill one case on this rank."""
    num_layers, num_tokens, num_heads, dim = case.q.shape
    num_kv_heads = case.k.shape[2]
    pool = KVPool(
        num_layers=num_layers,
        num_pages=NUM_PAGES,
        block_size=case.block_size,
        num_kv_heads=num_kv_heads,
        head_dim=dim,
        staging_blocks=num_blocks(num_tokens, case.block_size),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    # Memory that was never written must never matter.
    pool.flat_keys.fill_(torch.nan)
    pool.flat_values.fill_(torch.nan)
    clock = CommClock()
    comm = SequenceComm(mesh, Lane.PREFILL, clock)
    kernels = cpu_kernels(upcast=False, num_threads=case.num_threads)
    shape = KVShape(
        case.block_size, num_heads // num_kv_heads, dim, torch.float32, case.config.wire
    )
    ledger = Ledger(mesh.sp, NUM_PAGES, case.block_size)
    stages = [
        zigzag(start, stop, mesh.sp, case.block_size)
        for start, stop in prefill_stages(num_tokens, mesh.sp, case.block_size, case.stage_tokens)
    ]
    extents = ledger.place(0, tuple(piece for stage in stages for piece in stage))
    table = BlockTable(case.block_size)
    table.extend(extents)
    positions, outputs, reports = [], [], []
    with torch.inference_mode():
        for step, slices in enumerate(stages):
            start, stop = slices[0].start, slices[-1].stop
            work = Work(
                0, start, (0,) * (stop - start), slices,
                sample=stop == num_tokens, attention=case.params,
            )  # fmt: skip
            plan = StepPlan(Lane.PREFILL, step, (work,))
            batch = prefill_batch(plan, {0: table}, mesh.s, mesh.sp, torch.device("cpu"))
            attention = PrefillAttention(
                batch, pool, comm, kernels, case.config, shape,
                num_kv_heads=num_kv_heads, first_head=0,
            )  # fmt: skip
            own = np.concatenate(
                [np.arange(s.start, s.stop) for s in slices if s.rank == mesh.s] or [[]]
            ).astype(np.int64)
            rows = [x[:, own] for x in (case.q, case.k, case.v)]
            by_layer = []
            for layer in range(num_layers):
                q, k, v = (x[layer] for x in rows)
                pool.write(layer, batch.slots_T, k, v)
                by_layer.append(attention(layer, q, k, v))
            outputs.append(torch.stack(by_layer))
            positions.append(own)
            reports += attention.reports()
    comm.close()
    return Answer(
        np.concatenate(positions),
        torch.cat(outputs, dim=1).numpy(),
        tuple(reports),
        dict(clock.bytes_received),
        dict(clock.bytes_sent),
    )


def gather(answers: list[Answer]) -> Tensor:
    """All ranks' rows in the order of positions."""
    positions = np.concatenate([answer.positions for answer in answers])
    assert sorted(positions) == list(range(len(positions)))
    rows = np.concatenate([answer.o for answer in answers], axis=1)
    return torch.from_numpy(rows[:, np.argsort(positions)])
