"""Frozen configuration, built once in csps/cli/ and passed down."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from csps.core.attention import DENSE, AttentionParams, CsaConfig
from csps.core.plan import Layout
from csps.core.strategy import Placement, Strategy


class DType(StrEnum):
    """Type of weights, activations and KV."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def element_bytes(self) -> int:
        return 4 if self is DType.FLOAT32 else 2


class AttentionBackend(StrEnum):
    """Whose kernels a rank attends with."""

    AUTO = "auto"  # on a GPU, the fastest of each phase; torch on a CPU
    TORCH = "torch"
    TRITON = "triton"
    FLASHINFER = "flashinfer"  # and triton, where it has no kernel


# New tokens of a prefill step, by what computes it, where nobody says how many: few enough that a
# prompt that has just come waits for seconds at most, on a CPU of a few cores too.
STAGE_TOKENS = {"cpu": 2048, "cuda": 4096}


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What every rank must agree on; the coordinator sends it to each when it joins.

    `kv_memory_bytes` is per rank, 0 meaning a share of what is free; on a GPU,
    `gpu_memory_utilization` of all memory less what else the rank takes there, which `step_tokens`
    and `step_sequences` bound: the largest step. `max_model_len` 0 means the model's own context,
    which `rope_scaling` ("yarn:4") makes longer; `threads_per_rank` 0 means cores / ranks on the
    machine. `cuda_graphs`: for decode on GPUs, whose steps have one of `decode_layouts`.
    `async_scheduling`: decode is planned one step ahead, so every rank keeps what a step draws.
    """

    model: str
    dtype: DType = DType.BFLOAT16
    block_size: int = 64
    kv_memory_bytes: int = 0
    gpu_memory_utilization: float = 0.9
    step_tokens: int = 4096
    step_sequences: int = 64
    max_model_len: int = 0
    tp: int = 1
    placement: Placement = Placement.TOKENS
    threads_per_rank: int = 0
    collective_timeout_s: float = 300.0
    rope_scaling: str = ""
    attention_backend: AttentionBackend = AttentionBackend.AUTO
    cuda_graphs: bool = True
    async_scheduling: bool = True
    decode_layouts: tuple[Layout, ...] = tuple(Layout)
    csa: CsaConfig = field(default_factory=CsaConfig)


@dataclass(frozen=True, slots=True)
class ServerTls:
    """In PEM: a certificate, behind it those that lead to its authority, and its private key."""

    certificates: bytes = field(repr=False)
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """One coordinator. Token counts are of the whole server, not of a rank.

    `num_ranks` = sp * tp. `strategy` decided `setup.placement`. `long_tokens`: prompts at least
    this long are split over the ranks. `stage_tokens`: new tokens of one prefill step, 0 meaning
    what STAGE_TOKENS has for the ranks' device;
    `token_budget`: of one mixed step. `layout`: of steps that may have either. Without one, those
    of more than `shift_threshold` tokens have SP, 0 meaning that a cost model decides; then every
    `probe_every`-th step (0: none) has the layout that it did not choose. `tbt_target_ms`: of
    csps.sched.pacing, 0 meaning decode as fast as it can. `ageing`, `prefill_ranks`,
    `decode_ranks`, `prefix_cache` as in csps.sched.config. `step_timeout_s`: a step that some rank
    has not finished by then means that the rank is lost. `attention`: of
    requests that do not choose; prompts shorter than `csa_min_tokens` are always dense.
    `warm_up`: whether large steps are run before the first request, None meaning on GPUs.
    `port` of gRPC on `host`, 0 a free one; `http_port` of OpenAI's protocol, None none.
    `api_keys`: a caller of either must show one of them, unless there is none; never printed.
    `tls`: of both; None for clear text.
    `step_log`: where every step's row (csps.records.rows) goes.
    `metrics_port`: of Prometheus on `host`; 0 a free one, None no metrics. `otlp_endpoint`: where
    spans go, if anywhere.
    """

    setup: WorkerSetup
    strategy: Strategy = Strategy.CSPS
    num_ranks: int = 1
    long_tokens: int = 512
    stage_tokens: int = 0
    token_budget: int = 512
    layout: Layout | None = None
    shift_threshold: int = 0
    probe_every: int = 0
    tbt_target_ms: float = 0.0
    ageing: float = 0.5
    prefill_ranks: tuple[int, ...] = ()
    decode_ranks: tuple[int, ...] = ()
    prefix_cache: bool = True
    attention: AttentionParams = DENSE
    csa_min_tokens: int = 2048
    max_running: int = 64
    max_waiting_tokens: int = 1_000_000
    host: str = "127.0.0.1"
    port: int = 0
    http_port: int | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    tls: ServerTls | None = None
    control_host: str = "127.0.0.1"
    control_port: int = 0
    warm_up: bool | None = None
    step_log: Path | None = None
    metrics_port: int | None = None
    otlp_endpoint: str = ""
    start_timeout_s: float = 600.0
    step_timeout_s: float = 900.0
    heartbeat_timeout_s: float = 30.0

    @property
    def sp(self) -> int:
        """Ranks along the sequence axis."""
        return self.num_ranks // self.setup.tp

    @property
    def kv_shards(self) -> int:
        """Parts that a sequence's blocks are spread over: with HEADS, every rank has them all."""
        return self.sp if self.setup.placement is Placement.TOKENS else 1

    def kv_shard(self, rank: int) -> int:
        """Which of the `kv_shards` a rank holds (a part of)."""
        return rank // self.setup.tp % self.kv_shards
