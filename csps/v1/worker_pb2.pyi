from csps.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Lane(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LANE_UNSPECIFIED: _ClassVar[Lane]
    LANE_PREFILL: _ClassVar[Lane]
    LANE_DECODE: _ClassVar[Lane]
    LANE_MIXED: _ClassVar[Lane]
LANE_UNSPECIFIED: Lane
LANE_PREFILL: Lane
LANE_DECODE: Lane
LANE_MIXED: Lane

class WorkerReport(_message.Message):
    __slots__ = ("hello", "ready", "result", "failure", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    ready: Ready
    result: StepResult
    failure: Failure
    heartbeat: Heartbeat
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class WorkerCommand(_message.Message):
    __slots__ = ("setup", "plan", "release", "shutdown")
    SETUP_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SHUTDOWN_FIELD_NUMBER: _ClassVar[int]
    setup: Setup
    plan: StepPlan
    release: Release
    shutdown: Shutdown
    def __init__(self, setup: _Optional[_Union[Setup, _Mapping]] = ..., plan: _Optional[_Union[StepPlan, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., shutdown: _Optional[_Union[Shutdown, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("rank", "world_size", "version", "host", "pid")
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    rank: int
    world_size: int
    version: str
    host: str
    pid: int
    def __init__(self, rank: _Optional[int] = ..., world_size: _Optional[int] = ..., version: _Optional[str] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class Setup(_message.Message):
    __slots__ = ("model", "dtype", "block_size", "kv_memory_bytes", "max_model_len", "tp", "threads_per_rank", "collective_timeout_s", "csa", "rope_scaling", "placement", "gpu_memory_utilization", "step_tokens", "step_sequences", "attention_backend", "cuda_graphs", "decode_layouts", "async_scheduling")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    THREADS_PER_RANK_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    CSA_FIELD_NUMBER: _ClassVar[int]
    ROPE_SCALING_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_UTILIZATION_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKEND_FIELD_NUMBER: _ClassVar[int]
    CUDA_GRAPHS_FIELD_NUMBER: _ClassVar[int]
    DECODE_LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    ASYNC_SCHEDULING_FIELD_NUMBER: _ClassVar[int]
    model: str
    dtype: str
    block_size: int
    kv_memory_bytes: int
    max_model_len: int
    tp: int
    threads_per_rank: int
    collective_timeout_s: float
    csa: _generation_pb2.CsaSetup
    rope_scaling: str
    placement: str
    gpu_memory_utilization: float
    step_tokens: int
    step_sequences: int
    attention_backend: str
    cuda_graphs: bool
    decode_layouts: _containers.RepeatedScalarFieldContainer[str]
    async_scheduling: bool
    def __init__(self, model: _Optional[str] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., kv_memory_bytes: _Optional[int] = ..., max_model_len: _Optional[int] = ..., tp: _Optional[int] = ..., threads_per_rank: _Optional[int] = ..., collective_timeout_s: _Optional[float] = ..., csa: _Optional[_Union[_generation_pb2.CsaSetup, _Mapping]] = ..., rope_scaling: _Optional[str] = ..., placement: _Optional[str] = ..., gpu_memory_utilization: _Optional[float] = ..., step_tokens: _Optional[int] = ..., step_sequences: _Optional[int] = ..., attention_backend: _Optional[str] = ..., cuda_graphs: bool = ..., decode_layouts: _Optional[_Iterable[str]] = ..., async_scheduling: bool = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("num_blocks", "attention_backend", "device")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    attention_backend: str
    device: str
    def __init__(self, num_blocks: _Optional[int] = ..., attention_backend: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("message", "traceback")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    message: str
    traceback: str
    def __init__(self, message: _Optional[str] = ..., traceback: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Release(_message.Message):
    __slots__ = ("seq_ids",)
    SEQ_IDS_FIELD_NUMBER: _ClassVar[int]
    seq_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, seq_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Shutdown(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("lane", "step_id", "work", "layout")
    LANE_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    lane: Lane
    step_id: int
    work: _containers.RepeatedCompositeFieldContainer[Work]
    layout: str
    def __init__(self, lane: _Optional[_Union[Lane, str]] = ..., step_id: _Optional[int] = ..., work: _Optional[_Iterable[_Union[Work, _Mapping]]] = ..., layout: _Optional[str] = ...) -> None: ...

class Work(_message.Message):
    __slots__ = ("seq_id", "start", "slices", "new_extents", "sample", "sampling", "attention", "targets", "pending")
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    NEW_EXTENTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    seq_id: int
    start: int
    slices: _containers.RepeatedCompositeFieldContainer[Slice]
    new_extents: _containers.RepeatedCompositeFieldContainer[Extent]
    sample: bool
    sampling: _generation_pb2.SamplingParams
    attention: Attention
    targets: Targets
    pending: bool
    def __init__(self, seq_id: _Optional[int] = ..., start: _Optional[int] = ..., slices: _Optional[_Iterable[_Union[Slice, _Mapping]]] = ..., new_extents: _Optional[_Iterable[_Union[Extent, _Mapping]]] = ..., sample: bool = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., attention: _Optional[_Union[Attention, _Mapping]] = ..., targets: _Optional[_Union[Targets, _Mapping]] = ..., pending: bool = ...) -> None: ...

class Targets(_message.Message):
    __slots__ = ("start", "token_ids")
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    start: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, start: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Attention(_message.Message):
    __slots__ = ("kind", "gamma", "window_blocks", "seed")
    KIND_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    kind: _generation_pb2.AttentionKind
    gamma: float
    window_blocks: int
    seed: int
    def __init__(self, kind: _Optional[_Union[_generation_pb2.AttentionKind, str]] = ..., gamma: _Optional[float] = ..., window_blocks: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class Slice(_message.Message):
    __slots__ = ("rank", "start", "stop", "token_ids")
    RANK_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    start: int
    stop: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, rank: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Extent(_message.Message):
    __slots__ = ("rank", "first_page", "num_pages")
    RANK_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    first_page: int
    num_pages: int
    def __init__(self, rank: _Optional[int] = ..., first_page: _Optional[int] = ..., num_pages: _Optional[int] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("lane", "step_id", "sampled", "stats", "sparse", "scored")
    LANE_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    lane: Lane
    step_id: int
    sampled: _containers.RepeatedCompositeFieldContainer[SampledToken]
    stats: StepStats
    sparse: _containers.RepeatedCompositeFieldContainer[SparseReport]
    scored: _containers.RepeatedCompositeFieldContainer[ScoredTokens]
    def __init__(self, lane: _Optional[_Union[Lane, str]] = ..., step_id: _Optional[int] = ..., sampled: _Optional[_Iterable[_Union[SampledToken, _Mapping]]] = ..., stats: _Optional[_Union[StepStats, _Mapping]] = ..., sparse: _Optional[_Iterable[_Union[SparseReport, _Mapping]]] = ..., scored: _Optional[_Iterable[_Union[ScoredTokens, _Mapping]]] = ...) -> None: ...

class ScoredTokens(_message.Message):
    __slots__ = ("seq_id", "start", "logprobs")
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    seq_id: int
    start: int
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, seq_id: _Optional[int] = ..., start: _Optional[int] = ..., logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class SparseReport(_message.Message):
    __slots__ = ("seq_id", "kept_pairs", "causal_pairs", "fetched_blocks", "remote_blocks", "recall_p5", "heads")
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    KEPT_PAIRS_FIELD_NUMBER: _ClassVar[int]
    CAUSAL_PAIRS_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REMOTE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RECALL_P5_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    seq_id: int
    kept_pairs: int
    causal_pairs: int
    fetched_blocks: int
    remote_blocks: int
    recall_p5: float
    heads: _containers.RepeatedCompositeFieldContainer[_generation_pb2.HeadReport]
    def __init__(self, seq_id: _Optional[int] = ..., kept_pairs: _Optional[int] = ..., causal_pairs: _Optional[int] = ..., fetched_blocks: _Optional[int] = ..., remote_blocks: _Optional[int] = ..., recall_p5: _Optional[float] = ..., heads: _Optional[_Iterable[_Union[_generation_pb2.HeadReport, _Mapping]]] = ...) -> None: ...

class SampledToken(_message.Message):
    __slots__ = ("seq_id", "token_id", "logprob", "top")
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    seq_id: int
    token_id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[_generation_pb2.TopToken]
    def __init__(self, seq_id: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[_generation_pb2.TopToken, _Mapping]]] = ...) -> None: ...

class StepStats(_message.Message):
    __slots__ = ("wall_s", "compute_s", "comm_s", "exposed_comm_s", "bytes_sent", "bytes_received")
    class BytesSentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class BytesReceivedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WALL_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    COMM_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_COMM_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    wall_s: float
    compute_s: float
    comm_s: float
    exposed_comm_s: float
    bytes_sent: _containers.ScalarMap[str, int]
    bytes_received: _containers.ScalarMap[str, int]
    def __init__(self, wall_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., comm_s: _Optional[float] = ..., exposed_comm_s: _Optional[float] = ..., bytes_sent: _Optional[_Mapping[str, int]] = ..., bytes_received: _Optional[_Mapping[str, int]] = ...) -> None: ...
