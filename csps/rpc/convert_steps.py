"""Step records <-> protobuf messages."""

from typing import NamedTuple

from csps.core.plan import Lane, Layout
from csps.records.rows import StepRow
from csps.v1 import admin_pb2

# Fields of the same name and form in both.
_SAME = (
    "step_id", "started_s", "ended_s", "num_tokens", "num_sequences", "num_pairs", "num_keys",
    "wall_s", "compute_s", "comm_s", "exposed_comm_s", "bytes_sent", "dense_bytes", "density",
    "recall", "kv_pages",
)  # fmt: skip
_LISTS = ("wall_s", "compute_s", "comm_s", "exposed_comm_s", "kv_pages")
_OPTIONAL = ("dense_bytes", "density", "recall")


class StepBatch(NamedTuple):
    """Steps in the order of ending; `dropped` older ones were lost before them."""

    rows: tuple[StepRow, ...]
    dropped: int


def step_to_proto(row: StepRow) -> admin_pb2.StepRecord:
    return admin_pb2.StepRecord(
        lane=row.lane.value,
        layout=row.layout.value,
        predicted_s={layout.value: seconds for layout, seconds in row.predicted_s.items()},
        **{name: getattr(row, name) for name in _SAME},
    )


def step_from_proto(message: admin_pb2.StepRecord) -> StepRow:
    values = {name: getattr(message, name) for name in _SAME}
    values |= {name: tuple(values[name]) for name in _LISTS}
    values |= {name: None for name in _OPTIONAL if not message.HasField(name)}
    values["bytes_sent"] = dict(message.bytes_sent)
    return StepRow(
        lane=Lane(message.lane),
        layout=Layout(message.layout),
        predicted_s={Layout(key): seconds for key, seconds in message.predicted_s.items()},
        **values,
    )


def batch_from_proto(message: admin_pb2.WatchStepsResponse) -> StepBatch:
    return StepBatch(tuple(step_from_proto(step) for step in message.steps), message.num_dropped)
