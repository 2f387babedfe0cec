from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchStepsRequest(_message.Message):
    __slots__ = ("max_queued",)
    MAX_QUEUED_FIELD_NUMBER: _ClassVar[int]
    max_queued: int
    def __init__(self, max_queued: _Optional[int] = ...) -> None: ...

class WatchStepsResponse(_message.Message):
    __slots__ = ("steps", "num_dropped")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_DROPPED_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[StepRecord]
    num_dropped: int
    def __init__(self, steps: _Optional[_Iterable[_Union[StepRecord, _Mapping]]] = ..., num_dropped: _Optional[int] = ...) -> None: ...

class StepRecord(_message.Message):
    __slots__ = ("lane", "step_id", "started_s", "ended_s", "layout", "num_tokens", "num_sequences", "num_pairs", "num_keys", "wall_s", "compute_s", "comm_s", "exposed_comm_s", "bytes_sent", "dense_bytes", "predicted_s", "density", "recall", "kv_pages")
    class BytesSentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class PredictedSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    LANE_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_S_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_PAIRS_FIELD_NUMBER: _ClassVar[int]
    NUM_KEYS_FIELD_NUMBER: _ClassVar[int]
    WALL_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    COMM_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_COMM_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    DENSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    KV_PAGES_FIELD_NUMBER: _ClassVar[int]
    lane: str
    step_id: int
    started_s: float
    ended_s: float
    layout: str
    num_tokens: int
    num_sequences: int
    num_pairs: int
    num_keys: int
    wall_s: _containers.RepeatedScalarFieldContainer[float]
    compute_s: _containers.RepeatedScalarFieldContainer[float]
    comm_s: _containers.RepeatedScalarFieldContainer[float]
    exposed_comm_s: _containers.RepeatedScalarFieldContainer[float]
    bytes_sent: _containers.ScalarMap[str, int]
    dense_bytes: int
    predicted_s: _containers.ScalarMap[str, float]
    density: float
    recall: float
    kv_pages: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lane: _Optional[str] = ..., step_id: _Optional[int] = ..., started_s: _Optional[float] = ..., ended_s: _Optional[float] = ..., layout: _Optional[str] = ..., num_tokens: _Optional[int] = ..., num_sequences: _Optional[int] = ..., num_pairs: _Optional[int] = ..., num_keys: _Optional[int] = ..., wall_s: _Optional[_Iterable[float]] = ..., compute_s: _Optional[_Iterable[float]] = ..., comm_s: _Optional[_Iterable[float]] = ..., exposed_comm_s: _Optional[_Iterable[float]] = ..., bytes_sent: _Optional[_Mapping[str, int]] = ..., dense_bytes: _Optional[int] = ..., predicted_s: _Optional[_Mapping[str, float]] = ..., density: _Optional[float] = ..., recall: _Optional[float] = ..., kv_pages: _Optional[_Iterable[int]] = ...) -> None: ...
