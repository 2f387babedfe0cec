"""Step records survive the wire."""

from hypothesis import given
from hypothesis import strategies as st

from csps.core.plan import Lane, Layout
from csps.records.rows import StepRow
from csps.rpc.convert_steps import StepBatch, batch_from_proto, step_to_proto
from csps.v1 import admin_pb2

count = st.integers(0, 2**63)
seconds = st.floats(0, 1e10)
share = st.none() | st.floats(0, 1)
by_rank = st.lists(seconds, max_size=4).map(tuple)

rows = st.builds(
    StepRow,
    lane=st.sampled_from(Lane),
    step_id=count,
    started_s=seconds,
    ended_s=seconds,
    layout=st.sampled_from(Layout),
    num_tokens=count,
    num_sequences=count,
    num_pairs=count,
    num_keys=count,
    wall_s=by_rank,
    compute_s=by_rank,
    comm_s=by_rank,
    exposed_comm_s=by_rank,
    bytes_sent=st.dictionaries(st.sampled_from(["kv", "query", "mass"]), count),
    dense_bytes=st.none() | count,
    predicted_s=st.dictionaries(st.sampled_from(Layout), seconds),
    density=share,
    recall=share,
    kv_pages=st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple),
)


@given(st.lists(rows, max_size=3), count)
def test_steps(steps: list[StepRow], dropped: int) -> None:
    message = admin_pb2.WatchStepsResponse(
        steps=[step_to_proto(row) for row in steps], num_dropped=dropped
    )
    sent = admin_pb2.WatchStepsResponse.FromString(message.SerializeToString())
    assert batch_from_proto(sent) == StepBatch(tuple(steps), dropped)
