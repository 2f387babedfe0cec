"""core.attention <-> protobuf messages: how a prefill attends, and what it approximated."""

from csps.core.attention import (
    AttentionKind,
    AttentionParams,
    CsaConfig,
    Estimate,
    HeadReport,
    SparseReport,
    Wire,
)
from csps.v1 import generation_pb2, worker_pb2

ATTENTION_TO_PROTO = {
    AttentionKind.DENSE: generation_pb2.ATTENTION_KIND_DENSE,
    AttentionKind.CSA: generation_pb2.ATTENTION_KIND_CSA,
    AttentionKind.CSA_DISTANCE: generation_pb2.ATTENTION_KIND_CSA_DISTANCE,
}
ATTENTION_FROM_PROTO = {value: key for key, value in ATTENTION_TO_PROTO.items()}
_HEAD_FIELDS = (
    "layer", "head", "gamma", "density", "num_probes", "recall_mean", "recall_var", "recall_p5",
    "recall_min",
)  # fmt: skip


def attention_to_proto(params: AttentionParams) -> worker_pb2.Attention:
    return worker_pb2.Attention(
        kind=ATTENTION_TO_PROTO[params.kind],
        gamma=params.gamma,
        window_blocks=params.window_blocks,
        seed=params.seed,
    )


def attention_from_proto(message: worker_pb2.Attention) -> AttentionParams:
    return AttentionParams(
        kind=ATTENTION_FROM_PROTO[message.kind],
        gamma=message.gamma,
        window_blocks=message.window_blocks,
        seed=message.seed,
    )


def csa_to_proto(config: CsaConfig) -> generation_pb2.CsaSetup:
    return generation_pb2.CsaSetup(
        min_recall=config.min_recall,
        min_recall_p5=config.min_recall_p5,
        max_density=config.max_density,
        rows_per_tile=config.rows_per_tile,
        estimate=config.estimate.value,
        wire=config.wire.value,
        pipeline=config.pipeline,
    )


def csa_from_proto(message: generation_pb2.CsaSetup) -> CsaConfig:
    return CsaConfig(
        min_recall=message.min_recall,
        min_recall_p5=message.min_recall_p5,
        max_density=message.max_density,
        rows_per_tile=message.rows_per_tile,
        estimate=Estimate(message.estimate),
        wire=Wire(message.wire),
        pipeline=message.pipeline,
    )


def head_to_proto(report: HeadReport) -> generation_pb2.HeadReport:
    return generation_pb2.HeadReport(**{name: getattr(report, name) for name in _HEAD_FIELDS})


def head_from_proto(message: generation_pb2.HeadReport) -> HeadReport:
    return HeadReport(**{name: getattr(message, name) for name in _HEAD_FIELDS})


def sparse_to_proto(report: SparseReport) -> worker_pb2.SparseReport:
    return worker_pb2.SparseReport(
        seq_id=report.seq_id,
        kept_pairs=report.kept_pairs,
        causal_pairs=report.causal_pairs,
        fetched_blocks=report.fetched_blocks,
        remote_blocks=report.remote_blocks,
        recall_p5=report.recall_p5,
        heads=[head_to_proto(head) for head in report.heads],
    )


def sparse_from_proto(message: worker_pb2.SparseReport) -> SparseReport:
    return SparseReport(
        seq_id=message.seq_id,
        kept_pairs=message.kept_pairs,
        causal_pairs=message.causal_pairs,
        fetched_blocks=message.fetched_blocks,
        remote_blocks=message.remote_blocks,
        recall_p5=message.recall_p5,
        heads=tuple(head_from_proto(head) for head in message.heads),
    )
