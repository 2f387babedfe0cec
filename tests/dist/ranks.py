"""Real ranks for tests: processes over Gloo that run the engine on plans of the real scheduler."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from csps.attention.backends import FixedDecode, FixedRows, PagedDecode
from csps.attention.kv import KVStore
from csps.attention.shards import Run
from csps.core.attention import DENSE, AttentionParams, CsaConfig
from csps.core.config import AttentionBackend, DType, WorkerSetup
from csps.core.plan import Lane, Layout, SampledToken, StepPlan, StepResult
from csps.core.request import SamplingParams
from csps.core.strategy import Placement
from csps.engine.bucketed import BucketedDecode, Prepare
from csps.engine.fixed_steps import fixed_rows
from csps.engine.placements import HeadsSharded
from csps.engine.runner import Runner
from csps.rpc import convert
from csps.sched.chunked import ChunkedScheduler
from csps.sched.config import SchedulerConfig
from csps.sched.disagg import DisaggScheduler
from csps.sched.scheduler import Scheduler
from csps.sched.sequence import Sequence
from csps.worker.build import build_runner
from csps.worker.place import Place, connect_ranks, pick_device

TIMEOUT_S = 120.0


def run_ranks(world_size: int, work: Callable[..., Any], *arguments: object) -> list[Any]:
    """`work(place, *arguments)` in each of `world_size` processes; what each returned, by rank.

    AssertionError with the traceback of the first rank that failed; no process outlives this.
    """
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(
                target=_main,
                args=(answers, rank, world_size, f"file://{directory}/store", work, arguments),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            results = {}
            for _ in processes:
                rank, result, trace = answers.get(timeout=TIMEOUT_S)
                assert trace is None, f"rank {rank}:\n{trace}"
                results[rank] = result
        except Empty:
            raise AssertionError(f"ranks did not finish in {TIMEOUT_S} s") from None
        finally:
            for process in processes:
                process.join(5.0)
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def _main(
    answers: Any,
    rank: int,
    world_size: int,
    rendezvous: str,
    work: Callable[..., Any],
    arguments: tuple[object, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        place = Place(rank, world_size, rank, world_size, rendezvous)
        answers.put((rank, work(place, *arguments), None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))


@dataclass(frozen=True)
class Request:
    """One request of a job; `abort_after` drawn tokens it is cancelled."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    attention: AttentionParams = DENSE
    start_step: int = 0
    abort_after: int | None = None


@dataclass(frozen=True)
class Job:
    """What to serve. Scheduler sizes are small so that tiny prompts span, stage and preempt."""

    model: Path
    requests: tuple[Request, ...]
    tp: int = 1
    block_size: int = 4
    num_pages: int = 200
    stage_tokens: int = 64
    long_tokens: int = 16
    max_model_len: int = 512
    csa: CsaConfig = field(default_factory=CsaConfig)
    attention_backend: AttentionBackend = AttentionBackend.AUTO
    placement: Placement = Placement.TOKENS
    token_budget: int = 64
    layouts: tuple[Layout, ...] = (Layout.SP,)  # of the steps, in turn
    decode_layouts: tuple[Layout, ...] = (Layout.SP,)  # of the steps of a decode lane
    buckets: tuple[int, ...] = ()  # of decode, as with CUDA graphs
    device: str = "cpu"  # or "cuda": the rank's GPU
    staged: bool = False  # transfers go through host buffers on a CPU too
    ahead: bool = False  # decode is planned a step ahead


@dataclass(frozen=True)
class Outcome:
    """What a job's ranks agree on, and what this rank did."""

    outputs: tuple[tuple[int, ...], ...]
    results: tuple[StepResult, ...]
    plans: tuple[StepPlan, ...]
    max_blocks: tuple[tuple[int, ...], ...]  # by request: most blocks held, by rank
    num_preemptions: int
    num_bucketed: int  # steps
    kv: np.ndarray  # this rank's K and V when all was done, pages and all


def serve(place: Place, job: Job) -> Outcome:
    """Run a job to its end. Every rank has the whole scheduler; sampled tokens are exchanged."""
    setup = WorkerSetup(
        model=str(job.model),
        dtype=DType.FLOAT32,
        block_size=job.block_size,
        kv_memory_bytes=1 << 26,
        max_model_len=job.max_model_len,
        tp=job.tp,
        placement=job.placement,
        threads_per_rank=1,
        collective_timeout_s=60.0,
        csa=job.csa,
        attention_backend=job.attention_backend,
        async_scheduling=job.ahead,
    )
    device = torch.device("cpu") if job.device == "cpu" else pick_device(place.local_rank)
    mesh = connect_ranks(setup, place, device, shares="the same" if job.staged else "")
    runner = build_runner(setup, place, mesh).runner
    for flat in (runner.attention.pool.flat_keys, runner.attention.pool.flat_values):
        flat.zero_()  # what nobody writes is the same in all jobs, whatever the device
    if job.buckets:
        runner.bucketed = in_buckets(runner, job.buckets)
    scheduler = scheduler_of(job, mesh.sp)
    sequences = [
        Sequence(i, r.prompt, r.sampling, attention=r.attention) for i, r in enumerate(job.requests)
    ]
    waiting = dict(enumerate(job.requests))
    planned: dict[Lane, list[StepPlan]] = {lane: [] for lane in scheduler.lanes}
    plans: list[StepPlan] = []
    results: list[StepResult] = []
    most = [[0] * scheduler.config.num_ranks for _ in sequences]
    shard = mesh.s if job.placement is Placement.TOKENS else 0
    while waiting or any(scheduler.has_work(lane) for lane in scheduler.lanes):
        for index in [i for i, r in waiting.items() if r.start_step <= len(plans)]:
            del waiting[index]
            scheduler.add(sequences[index])
        for lane in scheduler.lanes:
            planned[lane] += _plan(scheduler, lane, job, ahead=bool(planned[lane]))
            if job.ahead and planned[lane]:
                planned[lane] += _plan(scheduler, lane, job, ahead=True)
            runner.release(scheduler.released())
            if not planned[lane]:
                if not any(scheduler.has_work(other) for other in scheduler.lanes) and waiting:
                    waiting = {i: replace(r, start_step=0) for i, r in waiting.items()}
                continue
            plan = planned[lane].pop(0)
            plans.append(plan)
            seen = convert.plan_from_proto(convert.plan_to_proto(plan, shard))
            results.append(runner.run(seen))
            for work in plan.work:
                held = scheduler.ledger.blocks_by_rank(work.seq_id)
                most[work.seq_id] = [
                    max(a, b) for a, b in zip(most[work.seq_id], held, strict=True)
                ]
            scheduler.complete(plan, _exchange(results[-1].sampled))
            runner.release(scheduler.released())
            _abort(scheduler, job, sequences)
            runner.release(scheduler.released())
            scheduler.check_integrity()
    assert scheduler.kv_usage == 0.0
    assert not runner._states, "a rank still remembers a sequence"
    num_bucketed = sum(map(runner.bucketed.takes, plans)) if runner.bucketed else 0
    runner.close()
    dist.destroy_process_group()
    return Outcome(
        outputs=tuple(tuple(seq.output_ids) for seq in sequences),
        results=tuple(results),
        plans=tuple(plans),
        max_blocks=tuple(map(tuple, most)),
        num_preemptions=scheduler.num_preemptions,
        num_bucketed=num_bucketed,
        kv=_kv(runner, job.num_pages * job.block_size),
    )


def _plan(scheduler: Scheduler, lane: Lane, job: Job, ahead: bool) -> list[StepPlan]:
    """The lane's next step, if there is one. Layouts come in turn."""
    plan = scheduler.plan(lane, ahead=ahead)
    if plan is None:
        return []
    layouts = job.decode_layouts if lane is Lane.DECODE else job.layouts
    return [replace(plan, layout=layouts[plan.step_id % len(layouts)])]


def scheduler_of(job: Job, sp: int) -> Scheduler:
    """The real scheduler of the job's placement."""
    by_head = job.placement is Placement.HEADS
    config = SchedulerConfig(
        num_ranks=1 if by_head else sp,
        block_size=job.block_size,
        pages_per_rank=job.num_pages,
        stage_tokens=job.stage_tokens,
        long_tokens=job.long_tokens,
        token_budget=job.token_budget,
        max_running=64,
        max_waiting_tokens=1 << 20,
        max_model_len=job.max_model_len,
    )
    return ChunkedScheduler(config) if by_head else DisaggScheduler(config)


def in_buckets(
    runner: Runner, sizes: tuple[int, ...], prepare: Prepare = lambda run: run
) -> BucketedDecode:
    """What a GPU captures, run as it is, or as `prepare` makes it."""
    attention = runner.attention
    kernels = attention.kernels
    decode = kernels.paged_decode
    if not isinstance(decode, FixedDecode):
        decode = _AnyDecode(decode)
    *_, lane = runner.lanes.values()
    placed = replace(attention, kernels=kernels._replace(paged_decode=decode))
    bucketed = BucketedDecode(placed, lane, tuple(Layout), sizes, prepare)
    if isinstance(decode, _AnyDecode):
        placement = Placement.HEADS if isinstance(attention, HeadsSharded) else Placement.TOKENS
        # What is counted before the KV gets its memory.
        counted = [
            rows
            for size in sizes
            for rows in fixed_rows(placement, tuple(Layout), lane.sequence.size, size)
        ]
        assert sorted(decode.made) in ([], sorted(counted))  # nothing where there are no heads
    return bucketed


@dataclass
class _AnyDecode:
    """Fixed rows of kernels that take a step's rows only when they prepare it.

    `made`: how many rows each has.
    """

    decode: PagedDecode
    made: list[int] = field(default_factory=list)

    def fixed(self, store: KVStore, num_rows: int) -> FixedRows:
        self.made.append(num_rows)
        return _AnyRows(self.decode, store, num_rows)


class _AnyRows:
    def __init__(self, decode: PagedDecode, store: KVStore, num_rows: int) -> None:
        self._decode, self._store, self._num_rows = decode, store, num_rows
        self.load([])

    def load(self, shards: list[tuple[Run, ...]]) -> None:
        none = [()] * (self._num_rows - len(shards))
        self._attend = self._decode(self._store, [*shards, *none])

    def __call__(self, layer: int, q_NHD: Tensor, o_NHD: Tensor, lse_NH: Tensor) -> None:
        self._attend(layer, q_NHD, o_NHD, lse_NH)


def _kv(runner: Runner, num_tokens: int) -> np.ndarray:
    """[2, layers, KV heads, tokens, head dim] of the pages that the ledger knows."""
    pool = runner.attention.pool
    return torch.stack((pool._keys, pool._values))[:, :, :, :num_tokens].cpu().numpy()


def _exchange(sampled: tuple[SampledToken, ...]) -> dict[int, SampledToken]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sampled)
    return {token.seq_id: token for tokens in everyone for token in tokens}


def _abort(scheduler: Scheduler, job: Job, sequences: list[Sequence]) -> None:
    for seq, request in zip(sequences, job.requests, strict=True):
        if request.abort_after is not None and len(seq.output_ids) >= request.abort_after:
            scheduler.abort(seq.seq_id)
