"""Core values survive the way through protobuf, on the wire included."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from csps.core.attention import (
    DENSE,
    AttentionKind,
    AttentionParams,
    HeadReport,
    SparseReport,
)
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
from csps.core.request import MAX_LOGPROBS, SamplingParams
from csps.core.shards import Extent, Slice
from csps.rpc import convert
from csps.v1 import generation_pb2, worker_pb2

NUM_RANKS = 3

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
int32 = st.integers(-(2**31), 2**31 - 1)
float32 = st.floats(width=32, allow_nan=False)
seconds = st.floats(0, 1e6)
shares = st.floats(0, 1)
token_ids = st.integers(0, 2**31)

sampling_params = st.builds(
    SamplingParams,
    max_tokens=st.none() | int32,
    min_tokens=int32,
    temperature=float32,
    top_p=float32,
    top_k=int32,
    stop=st.lists(st.text(max_size=8), max_size=4).map(tuple),
    stop_token_ids=st.lists(uint32, max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    seed=st.none() | st.integers(0, 2**63 - 1),
    logprobs=st.none() | st.integers(0, MAX_LOGPROBS),
    prompt_logprobs=st.none() | int32,
)
targets = st.builds(Targets, uint32, st.lists(uint32, max_size=5).map(tuple))
sparse_kinds = [kind for kind in AttentionKind if kind is not AttentionKind.DENSE]
sparse_params = st.builds(AttentionParams, st.sampled_from(sparse_kinds), shares, uint32, uint32)


@st.composite
def works(draw: st.DrawFn) -> Work:
    """Slices that follow each other, as the scheduler makes them."""
    start = draw(st.integers(0, 10_000))
    slices = []
    at = start
    for length in draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)):
        slices.append(Slice(draw(st.integers(0, NUM_RANKS - 1)), at, at + length))
        at += length
    extents = st.builds(Extent, st.integers(0, NUM_RANKS - 1), uint32, st.integers(1, 100))
    return Work(
        seq_id=draw(uint64),
        start=start,
        token_ids=tuple(draw(st.lists(token_ids, min_size=at - start, max_size=at - start))),
        slices=tuple(slices),
        new_extents=tuple(draw(st.lists(extents, max_size=3))),
        sample=draw(st.booleans()),
        sampling=draw(st.none() | sampling_params),
        attention=draw(st.just(DENSE) | sparse_params),
        targets=draw(st.none() | targets),
        pending=draw(st.booleans()),
    )


plans = st.builds(
    StepPlan, st.sampled_from(Lane), st.integers(0, 2**40), st.lists(works(), max_size=3).map(tuple)
)


@st.composite
def sampled_tokens(draw: st.DrawFn) -> SampledToken:
    top = draw(st.lists(st.tuples(uint32, float32), max_size=MAX_LOGPROBS))
    return SampledToken(
        seq_id=draw(uint64),
        token_id=draw(uint32),
        logprob=draw(st.none() | float32),
        top_ids=tuple(token_id for token_id, _ in top),
        top_logprobs=tuple(logprob for _, logprob in top),
    )


stats = st.builds(
    StepStats,
    wall_s=seconds,
    compute_s=seconds,
    comm_s=seconds,
    exposed_comm_s=seconds,
    bytes_sent=st.dictionaries(st.sampled_from(["kv", "query", "partial", "hidden"]), uint64),
)
scored_tokens = st.builds(ScoredTokens, uint64, uint32, st.lists(float32, max_size=5).map(tuple))
head_reports = st.builds(
    HeadReport, uint32, uint32, shares, shares, uint32, shares, shares, shares, shares
)
sparse_reports = st.builds(
    SparseReport,
    *(uint64, uint64, uint64, uint64, uint64),
    recall_p5=shares,
    heads=st.lists(head_reports, max_size=2).map(tuple),
)
results = st.builds(
    StepResult,
    rank=st.integers(0, NUM_RANKS - 1),
    lane=st.sampled_from(Lane),
    step_id=st.integers(0, 2**40),
    sampled=st.lists(sampled_tokens(), max_size=3).map(tuple),
    stats=stats,
    sparse=st.lists(sparse_reports, max_size=2).map(tuple),
    scored=st.lists(scored_tokens, max_size=2).map(tuple),
)
setups = st.builds(
    WorkerSetup,
    model=st.text(max_size=20),
    dtype=st.sampled_from(DType),
    block_size=uint32,
    kv_memory_bytes=uint64,
    gpu_memory_utilization=shares,
    step_tokens=uint32,
    step_sequences=uint32,
    max_model_len=uint32,
    tp=uint32,
    threads_per_rank=uint32,
    collective_timeout_s=seconds,
    attention_backend=st.sampled_from(AttentionBackend),
    cuda_graphs=st.booleans(),
    async_scheduling=st.booleans(),
    decode_layouts=st.lists(st.sampled_from(Layout)).map(tuple),
)


def hide_others(plan: StepPlan, rank: int) -> StepPlan:
    """`plan` with 0 for the tokens that other ranks compute: what `rank` is told."""
    work = []
    for item in plan.work:
        ids: list[int] = []
        for piece in item.slices:
            own = item.token_ids[piece.start - item.start : piece.stop - item.start]
            ids += own if piece.rank == rank else [0] * piece.num_tokens
        work.append(item._replace(token_ids=tuple(ids)))
    return replace(plan, work=tuple(work))


@given(sampling_params)
def test_sampling(params: SamplingParams) -> None:
    wire = convert.sampling_to_proto(params).SerializeToString()
    message = generation_pb2.SamplingParams.FromString(wire)
    assert convert.sampling_from_proto(message) == params


def test_unset_sampling_fields_take_the_defaults() -> None:
    assert convert.sampling_from_proto(generation_pb2.SamplingParams()) == SamplingParams()


def test_a_zero_that_was_sent_is_not_taken_for_unset() -> None:
    message = generation_pb2.SamplingParams(max_tokens=0, top_p=0.0, logprobs=0)
    params = convert.sampling_from_proto(message)
    assert (params.max_tokens, params.top_p, params.logprobs) == (0, 0.0, 0)


@given(plans, st.integers(0, NUM_RANKS - 1))
def test_plan_as_one_rank_gets_it(plan: StepPlan, rank: int) -> None:
    wire = convert.plan_to_proto(plan, rank).SerializeToString()
    assert convert.plan_from_proto(worker_pb2.StepPlan.FromString(wire)) == hide_others(plan, rank)


@given(plans)
def test_all_ranks_together_get_every_token(plan: StepPlan) -> None:
    views = [
        convert.plan_from_proto(convert.plan_to_proto(plan, rank)) for rank in range(NUM_RANKS)
    ]
    for index, item in enumerate(plan.work):
        seen = (view.work[index].token_ids for view in views)
        # At each position one rank has the id, the others 0.
        assert tuple(map(sum, zip(*seen, strict=True))) == item.token_ids


@given(results)
def test_result(result: StepResult) -> None:
    wire = convert.result_to_proto(result).SerializeToString()
    message = worker_pb2.StepResult.FromString(wire)
    assert convert.result_from_proto(message, result.rank) == result


@given(setups)
def test_setup(setup: WorkerSetup) -> None:
    wire = convert.setup_to_proto(setup).SerializeToString()
    assert convert.setup_from_proto(worker_pb2.Setup.FromString(wire)) == setup
