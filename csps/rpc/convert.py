"""core values <-> protobuf messages: with convert_attention the only place that knows both."""

from collections.abc import Sequence

from csps.core.attention import DENSE
from csps.core.config import AttentionBackend, DType, WorkerSetup
from csps.core.plan import (
    Lane,
    Layout,
    SampledToken,
    ScoredTokens,
    StepPlan,
    StepResult,
    StepStats,
    Targets,
    Work,
)
from csps.core.request import SamplingParams
from csps.core.shards import Extent, Slice
from csps.core.strategy import Placement
from csps.rpc.convert_attention import (
    attention_from_proto,
    attention_to_proto,
    csa_from_proto,
    csa_to_proto,
    sparse_from_proto,
    sparse_to_proto,
)
from csps.v1 import generation_pb2, worker_pb2

_LANE_TO_PROTO = {
    Lane.PREFILL: worker_pb2.LANE_PREFILL,
    Lane.DECODE: worker_pb2.LANE_DECODE,
    Lane.MIXED: worker_pb2.LANE_MIXED,
}
_LANE_FROM_PROTO = {value: key for key, value in _LANE_TO_PROTO.items()}
_OPTIONAL_SAMPLING = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "ignore_eos", "seed", "logprobs",
    "prompt_logprobs",
)  # fmt: skip


def sampling_to_proto(params: SamplingParams) -> generation_pb2.SamplingParams:
    """Every set field; None stays unset."""
    message = generation_pb2.SamplingParams(stop=params.stop, stop_token_ids=params.stop_token_ids)
    for name in _OPTIONAL_SAMPLING:
        value = getattr(params, name)
        if value is not None:
            setattr(message, name, value)
    return message


def sampling_from_proto(message: generation_pb2.SamplingParams) -> SamplingParams:
    """Unset fields take SamplingParams' defaults."""
    given = {name: getattr(message, name) for name in _OPTIONAL_SAMPLING if message.HasField(name)}
    return SamplingParams(
        stop=tuple(message.stop), stop_token_ids=tuple(message.stop_token_ids), **given
    )


def setup_to_proto(setup: WorkerSetup) -> worker_pb2.Setup:
    return worker_pb2.Setup(
        model=setup.model,
        dtype=setup.dtype.value,
        block_size=setup.block_size,
        kv_memory_bytes=setup.kv_memory_bytes,
        gpu_memory_utilization=setup.gpu_memory_utilization,
        step_tokens=setup.step_tokens,
        step_sequences=setup.step_sequences,
        max_model_len=setup.max_model_len,
        tp=setup.tp,
        placement=setup.placement.value,
        threads_per_rank=setup.threads_per_rank,
        collective_timeout_s=setup.collective_timeout_s,
        rope_scaling=setup.rope_scaling,
        attention_backend=setup.attention_backend.value,
        cuda_graphs=setup.cuda_graphs,
        async_scheduling=setup.async_scheduling,
        decode_layouts=[layout.value for layout in setup.decode_layouts],
        csa=csa_to_proto(setup.csa),
    )


def setup_from_proto(message: worker_pb2.Setup) -> WorkerSetup:
    return WorkerSetup(
        model=message.model,
        dtype=DType(message.dtype),
        block_size=message.block_size,
        kv_memory_bytes=message.kv_memory_bytes,
        gpu_memory_utilization=message.gpu_memory_utilization,
        step_tokens=message.step_tokens,
        step_sequences=message.step_sequences,
        max_model_len=message.max_model_len,
        tp=message.tp,
        placement=Placement(message.placement),
        threads_per_rank=message.threads_per_rank,
        collective_timeout_s=message.collective_timeout_s,
        rope_scaling=message.rope_scaling,
        attention_backend=AttentionBackend(message.attention_backend),
        cuda_graphs=message.cuda_graphs,
        async_scheduling=message.async_scheduling,
        decode_layouts=tuple(map(Layout, message.decode_layouts)),
        csa=csa_from_proto(message.csa),
    )


def plan_to_proto(plan: StepPlan, rank: int) -> worker_pb2.StepPlan:
    """The plan as `rank` (of the sequence axis) gets it: all slices and targets, its own tokens.

    In the TP layout every rank computes all tokens.
    """
    wanted = None if plan.layout is Layout.TP else rank
    return worker_pb2.StepPlan(
        lane=_LANE_TO_PROTO[plan.lane],
        step_id=plan.step_id,
        work=[_work_to_proto(item, wanted) for item in plan.work],
        layout=plan.layout.value,
    )


def _work_to_proto(work: Work, rank: int | None) -> worker_pb2.Work:
    slices = []
    for piece in work.slices:
        tokens: Sequence[int] = ()
        if rank in (None, piece.rank):
            tokens = work.token_ids[piece.start - work.start : piece.stop - work.start]
        slices.append(
            worker_pb2.Slice(rank=piece.rank, start=piece.start, stop=piece.stop, token_ids=tokens)
        )
    return worker_pb2.Work(
        seq_id=work.seq_id,
        start=work.start,
        slices=slices,
        new_extents=[
            worker_pb2.Extent(rank=e.rank, first_page=e.first_page, num_pages=e.num_pages)
            for e in work.new_extents
        ],
        sample=work.sample,
        sampling=sampling_to_proto(work.sampling) if work.sampling is not None else None,
        attention=attention_to_proto(work.attention) if work.attention.is_sparse else None,
        targets=worker_pb2.Targets(start=work.targets.start, token_ids=work.targets.token_ids)
        if work.targets is not None
        else None,
        pending=work.pending,
    )


def plan_from_proto(message: worker_pb2.StepPlan) -> StepPlan:
    """The rank's view: `Work.token_ids` holds 0 at positions that other ranks compute."""
    return StepPlan(
        lane=_LANE_FROM_PROTO[message.lane],
        step_id=message.step_id,
        work=tuple(_work_from_proto(item) for item in message.work),
        layout=Layout(message.layout),
    )


def _work_from_proto(message: worker_pb2.Work) -> Work:
    token_ids: list[int] = []
    for piece in message.slices:
        token_ids.extend(piece.token_ids or [0] * (piece.stop - piece.start))
    return Work(
        seq_id=message.seq_id,
        start=message.start,
        token_ids=tuple(token_ids),
        slices=tuple(Slice(p.rank, p.start, p.stop) for p in message.slices),
        new_extents=tuple(Extent(e.rank, e.first_page, e.num_pages) for e in message.new_extents),
        sample=message.sample,
        sampling=sampling_from_proto(message.sampling) if message.HasField("sampling") else None,
        attention=attention_from_proto(message.attention)
        if message.HasField("attention")
        else DENSE,
        targets=Targets(message.targets.start, tuple(message.targets.token_ids))
        if message.HasField("targets")
        else None,
        pending=message.pending,
    )


def result_to_proto(result: StepResult) -> worker_pb2.StepResult:
    """`rank` is not sent: the stream says who speaks."""
    stats = result.stats
    return worker_pb2.StepResult(
        lane=_LANE_TO_PROTO[result.lane],
        step_id=result.step_id,
        sampled=[_sampled_to_proto(token) for token in result.sampled],
        stats=worker_pb2.StepStats(
            wall_s=stats.wall_s,
            compute_s=stats.compute_s,
            comm_s=stats.comm_s,
            exposed_comm_s=stats.exposed_comm_s,
            bytes_sent=stats.bytes_sent,
            bytes_received=stats.bytes_received,
        ),
        sparse=[sparse_to_proto(report) for report in result.sparse],
        scored=[
            worker_pb2.ScoredTokens(seq_id=s.seq_id, start=s.start, logprobs=s.logprobs)
            for s in result.scored
        ],
    )


def result_from_proto(message: worker_pb2.StepResult, rank: int) -> StepResult:
    stats = message.stats
    return StepResult(
        rank=rank,
        lane=_LANE_FROM_PROTO[message.lane],
        step_id=message.step_id,
        sampled=tuple(_sampled_from_proto(token) for token in message.sampled),
        stats=StepStats(
            wall_s=stats.wall_s,
            compute_s=stats.compute_s,
            comm_s=stats.comm_s,
            exposed_comm_s=stats.exposed_comm_s,
            bytes_sent=dict(stats.bytes_sent),
            bytes_received=dict(stats.bytes_received),
        ),
        sparse=tuple(sparse_from_proto(report) for report in message.sparse),
        scored=tuple(ScoredTokens(s.seq_id, s.start, tuple(s.logprobs)) for s in message.scored),
    )


def _sampled_to_proto(token: SampledToken) -> worker_pb2.SampledToken:
    return worker_pb2.SampledToken(
        seq_id=token.seq_id,
        token_id=token.token_id,
        logprob=token.logprob,
        top=top_tokens_to_proto(token),
    )


def _sampled_from_proto(message: worker_pb2.SampledToken) -> SampledToken:
    return SampledToken(
        seq_id=message.seq_id,
        token_id=message.token_id,
        logprob=message.logprob if message.HasField("logprob") else None,
        top_ids=tuple(top.token_id for top in message.top),
        top_logprobs=tuple(top.logprob for top in message.top),
    )


def top_tokens_to_proto(token: SampledToken) -> list[generation_pb2.TopToken]:
    return [
        generation_pb2.TopToken(token_id=token_id, logprob=logprob)
        for token_id, logprob in zip(token.top_ids, token.top_logprobs, strict=True)
    ]
