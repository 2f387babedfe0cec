from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttentionKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ATTENTION_KIND_UNSPECIFIED: _ClassVar[AttentionKind]
    ATTENTION_KIND_DENSE: _ClassVar[AttentionKind]
    ATTENTION_KIND_CSA: _ClassVar[AttentionKind]
    ATTENTION_KIND_CSA_DISTANCE: _ClassVar[AttentionKind]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]
ATTENTION_KIND_UNSPECIFIED: AttentionKind
ATTENTION_KIND_DENSE: AttentionKind
ATTENTION_KIND_CSA: AttentionKind
ATTENTION_KIND_CSA_DISTANCE: AttentionKind
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "text", "token_ids", "messages", "sampling", "attention")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    text: str
    token_ids: TokenIds
    messages: ChatMessages
    sampling: SamplingParams
    attention: AttentionParams
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., messages: _Optional[_Union[ChatMessages, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., attention: _Optional[_Union[AttentionParams, _Mapping]] = ...) -> None: ...

class AttentionParams(_message.Message):
    __slots__ = ("kind", "gamma", "window_blocks", "report_heads")
    KIND_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REPORT_HEADS_FIELD_NUMBER: _ClassVar[int]
    kind: AttentionKind
    gamma: float
    window_blocks: int
    report_heads: bool
    def __init__(self, kind: _Optional[_Union[AttentionKind, str]] = ..., gamma: _Optional[float] = ..., window_blocks: _Optional[int] = ..., report_heads: bool = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ChatMessages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "stop", "stop_token_ids", "ignore_eos", "seed", "logprobs", "prompt_logprobs")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    seed: int
    logprobs: int
    prompt_logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., seed: _Optional[int] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "progress", "chunk", "complete")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    progress: Progress
    chunk: Chunk
    complete: Complete
    def __init__(self, request_id: _Optional[str] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., complete: _Optional[_Union[Complete, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("queued", "prefilled_tokens", "total_tokens")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    queued: bool
    prefilled_tokens: int
    total_tokens: int
    def __init__(self, queued: bool = ..., prefilled_tokens: _Optional[int] = ..., total_tokens: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("token_ids", "text", "logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("logprob", "top")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopToken]
    def __init__(self, logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopToken, _Mapping]]] = ...) -> None: ...

class TopToken(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Complete(_message.Message):
    __slots__ = ("finish_reason", "usage", "timings", "attention", "prompt_logprobs")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    attention: AttentionReport
    prompt_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, finish_reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., attention: _Optional[_Union[AttentionReport, _Mapping]] = ..., prompt_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class AttentionReport(_message.Message):
    __slots__ = ("kind", "gamma", "density", "union_density", "recall_mean", "recall_low", "recall_high", "recall_p5", "recall_min", "num_probes", "dense_share", "widened_share", "heads")
    KIND_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    UNION_DENSITY_FIELD_NUMBER: _ClassVar[int]
    RECALL_MEAN_FIELD_NUMBER: _ClassVar[int]
    RECALL_LOW_FIELD_NUMBER: _ClassVar[int]
    RECALL_HIGH_FIELD_NUMBER: _ClassVar[int]
    RECALL_P5_FIELD_NUMBER: _ClassVar[int]
    RECALL_MIN_FIELD_NUMBER: _ClassVar[int]
    NUM_PROBES_FIELD_NUMBER: _ClassVar[int]
    DENSE_SHARE_FIELD_NUMBER: _ClassVar[int]
    WIDENED_SHARE_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    kind: AttentionKind
    gamma: float
    density: float
    union_density: float
    recall_mean: float
    recall_low: float
    recall_high: float
    recall_p5: float
    recall_min: float
    num_probes: int
    dense_share: float
    widened_share: float
    heads: _containers.RepeatedCompositeFieldContainer[HeadReport]
    def __init__(self, kind: _Optional[_Union[AttentionKind, str]] = ..., gamma: _Optional[float] = ..., density: _Optional[float] = ..., union_density: _Optional[float] = ..., recall_mean: _Optional[float] = ..., recall_low: _Optional[float] = ..., recall_high: _Optional[float] = ..., recall_p5: _Optional[float] = ..., recall_min: _Optional[float] = ..., num_probes: _Optional[int] = ..., dense_share: _Optional[float] = ..., widened_share: _Optional[float] = ..., heads: _Optional[_Iterable[_Union[HeadReport, _Mapping]]] = ...) -> None: ...

class HeadReport(_message.Message):
    __slots__ = ("layer", "head", "gamma", "density", "num_probes", "recall_mean", "recall_var", "recall_p5", "recall_min")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    NUM_PROBES_FIELD_NUMBER: _ClassVar[int]
    RECALL_MEAN_FIELD_NUMBER: _ClassVar[int]
    RECALL_VAR_FIELD_NUMBER: _ClassVar[int]
    RECALL_P5_FIELD_NUMBER: _ClassVar[int]
    RECALL_MIN_FIELD_NUMBER: _ClassVar[int]
    layer: int
    head: int
    gamma: float
    density: float
    num_probes: int
    recall_mean: float
    recall_var: float
    recall_p5: float
    recall_min: float
    def __init__(self, layer: _Optional[int] = ..., head: _Optional[int] = ..., gamma: _Optional[float] = ..., density: _Optional[float] = ..., num_probes: _Optional[int] = ..., recall_mean: _Optional[float] = ..., recall_var: _Optional[float] = ..., recall_p5: _Optional[float] = ..., recall_min: _Optional[float] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "output_tokens", "cached_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queued_s", "first_scheduled_s", "first_token_s", "last_token_s")
    QUEUED_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_SCHEDULED_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    LAST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    queued_s: float
    first_scheduled_s: float
    first_token_s: float
    last_token_s: float
    def __init__(self, queued_s: _Optional[float] = ..., first_scheduled_s: _Optional[float] = ..., first_token_s: _Optional[float] = ..., last_token_s: _Optional[float] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("model", "architecture", "vocab_size", "max_model_len", "eos_token_ids", "has_chat_template", "num_parameters", "dtype")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    model: str
    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    has_chat_template: bool
    num_parameters: int
    dtype: str
    def __init__(self, model: _Optional[str] = ..., architecture: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., has_chat_template: bool = ..., num_parameters: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "strategy", "sp", "tp", "block_size", "blocks_per_rank", "stage_tokens", "long_tokens", "uptime_s", "lanes", "used_blocks_by_rank", "attention", "csa_gamma", "csa_min_tokens", "sparse_requests", "sparse", "token_budget", "preemptions", "prefix_cache", "model", "dtype", "max_model_len", "max_running", "max_waiting_tokens", "ageing", "layout", "shift_threshold", "prefill_ranks", "decode_ranks", "threads_per_rank", "csa_window_blocks", "csa", "attention_backends", "tbt_target_ms")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    SP_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_PER_RANK_FIELD_NUMBER: _ClassVar[int]
    STAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LONG_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCKS_BY_RANK_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    CSA_GAMMA_FIELD_NUMBER: _ClassVar[int]
    CSA_MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPARSE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BUDGET_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGEING_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SHIFT_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    PREFILL_RANKS_FIELD_NUMBER: _ClassVar[int]
    DECODE_RANKS_FIELD_NUMBER: _ClassVar[int]
    THREADS_PER_RANK_FIELD_NUMBER: _ClassVar[int]
    CSA_WINDOW_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CSA_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKENDS_FIELD_NUMBER: _ClassVar[int]
    TBT_TARGET_MS_FIELD_NUMBER: _ClassVar[int]
    version: str
    strategy: str
    sp: int
    tp: int
    block_size: int
    blocks_per_rank: int
    stage_tokens: int
    long_tokens: int
    uptime_s: float
    lanes: _containers.RepeatedCompositeFieldContainer[LaneCounters]
    used_blocks_by_rank: _containers.RepeatedScalarFieldContainer[int]
    attention: str
    csa_gamma: float
    csa_min_tokens: int
    sparse_requests: int
    sparse: AttentionReport
    token_budget: int
    preemptions: int
    prefix_cache: PrefixCache
    model: str
    dtype: str
    max_model_len: int
    max_running: int
    max_waiting_tokens: int
    ageing: float
    layout: str
    shift_threshold: int
    prefill_ranks: _containers.RepeatedScalarFieldContainer[int]
    decode_ranks: _containers.RepeatedScalarFieldContainer[int]
    threads_per_rank: int
    csa_window_blocks: int
    csa: CsaSetup
    attention_backends: _containers.RepeatedScalarFieldContainer[str]
    tbt_target_ms: float
    def __init__(self, version: _Optional[str] = ..., strategy: _Optional[str] = ..., sp: _Optional[int] = ..., tp: _Optional[int] = ..., block_size: _Optional[int] = ..., blocks_per_rank: _Optional[int] = ..., stage_tokens: _Optional[int] = ..., long_tokens: _Optional[int] = ..., uptime_s: _Optional[float] = ..., lanes: _Optional[_Iterable[_Union[LaneCounters, _Mapping]]] = ..., used_blocks_by_rank: _Optional[_Iterable[int]] = ..., attention: _Optional[str] = ..., csa_gamma: _Optional[float] = ..., csa_min_tokens: _Optional[int] = ..., sparse_requests: _Optional[int] = ..., sparse: _Optional[_Union[AttentionReport, _Mapping]] = ..., token_budget: _Optional[int] = ..., preemptions: _Optional[int] = ..., prefix_cache: _Optional[_Union[PrefixCache, _Mapping]] = ..., model: _Optional[str] = ..., dtype: _Optional[str] = ..., max_model_len: _Optional[int] = ..., max_running: _Optional[int] = ..., max_waiting_tokens: _Optional[int] = ..., ageing: _Optional[float] = ..., layout: _Optional[str] = ..., shift_threshold: _Optional[int] = ..., prefill_ranks: _Optional[_Iterable[int]] = ..., decode_ranks: _Optional[_Iterable[int]] = ..., threads_per_rank: _Optional[int] = ..., csa_window_blocks: _Optional[int] = ..., csa: _Optional[_Union[CsaSetup, _Mapping]] = ..., attention_backends: _Optional[_Iterable[str]] = ..., tbt_target_ms: _Optional[float] = ...) -> None: ...

class CsaSetup(_message.Message):
    __slots__ = ("min_recall", "max_density", "rows_per_tile", "estimate", "wire", "pipeline", "min_recall_p5")
    MIN_RECALL_FIELD_NUMBER: _ClassVar[int]
    MAX_DENSITY_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_TILE_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    MIN_RECALL_P5_FIELD_NUMBER: _ClassVar[int]
    min_recall: float
    max_density: float
    rows_per_tile: int
    estimate: str
    wire: str
    pipeline: bool
    min_recall_p5: float
    def __init__(self, min_recall: _Optional[float] = ..., max_density: _Optional[float] = ..., rows_per_tile: _Optional[int] = ..., estimate: _Optional[str] = ..., wire: _Optional[str] = ..., pipeline: bool = ..., min_recall_p5: _Optional[float] = ...) -> None: ...

class PrefixCache(_message.Message):
    __slots__ = ("query_tokens", "hit_tokens", "blocks", "evictions")
    QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    query_tokens: int
    hit_tokens: int
    blocks: int
    evictions: int
    def __init__(self, query_tokens: _Optional[int] = ..., hit_tokens: _Optional[int] = ..., blocks: _Optional[int] = ..., evictions: _Optional[int] = ...) -> None: ...

class LaneCounters(_message.Message):
    __slots__ = ("lane", "steps", "tokens", "wall_s", "compute_s", "comm_s", "exposed_comm_s", "bytes_sent", "received_by_rank", "layouts")
    class BytesSentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    LANE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    WALL_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    COMM_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_COMM_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BY_RANK_FIELD_NUMBER: _ClassVar[int]
    LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    lane: str
    steps: int
    tokens: int
    wall_s: float
    compute_s: float
    comm_s: float
    exposed_comm_s: float
    bytes_sent: _containers.ScalarMap[str, int]
    received_by_rank: _containers.RepeatedScalarFieldContainer[int]
    layouts: _containers.RepeatedCompositeFieldContainer[LayoutCounters]
    def __init__(self, lane: _Optional[str] = ..., steps: _Optional[int] = ..., tokens: _Optional[int] = ..., wall_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., comm_s: _Optional[float] = ..., exposed_comm_s: _Optional[float] = ..., bytes_sent: _Optional[_Mapping[str, int]] = ..., received_by_rank: _Optional[_Iterable[int]] = ..., layouts: _Optional[_Iterable[_Union[LayoutCounters, _Mapping]]] = ...) -> None: ...

class LayoutCounters(_message.Message):
    __slots__ = ("layout", "steps", "tokens", "wall_s", "predicted_s")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    WALL_S_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
    layout: str
    steps: int
    tokens: int
    wall_s: float
    predicted_s: float
    def __init__(self, layout: _Optional[str] = ..., steps: _Optional[int] = ..., tokens: _Optional[int] = ..., wall_s: _Optional[float] = ..., predicted_s: _Optional[float] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("num_waiting", "num_running", "queued_tokens", "kv_usage")
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    num_waiting: int
    num_running: int
    queued_tokens: int
    kv_usage: float
    def __init__(self, num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., kv_usage: _Optional[float] = ...) -> None: ...
