"""Costs against hand arithmetic, and what must hold of any."""

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from csps.core.attention import AttentionKind
from csps.core.plan import Lane, Layout
from csps.core.strategy import Strategy
from csps.sched.cost import StepShape
from csps.sim.cluster import AnalyticCluster, load_cluster
from csps.sim.cost_decode import DecodeCosts, DecodeMoves
from csps.sim.cost_heads import HeadsCosts
from csps.sim.density import EVERYTHING, density_table
from csps.sim.fabric import Fabric
from csps.sim.files import shipped
from csps.sim.holdings import Spread
from csps.sim.model import WeightType, load_model
from csps.sim.roofline import make_roofline
from tests.unit.simulating import CLUSTER, request, run

assert isinstance(CLUSTER, AnalyticCluster)
SPREAD = load_cluster("a100x32")
assert isinstance(SPREAD, AnalyticCluster)
BIG = load_model("llama-3.1-70b")
FEW = hypothesis_settings(max_examples=50, deadline=None)


def test_one_request_on_one_rank_by_hand() -> None:
    """SmolLM2-135M: 30 layers of 9 heads of 64, hidden 576, MLP 1,536, vocabulary 49,152."""
    result = run([request(0.0, 1000, 2, 0)], Strategy.RING, replicas=8, stage_tokens=4096)
    prefill, decode = result.steps
    weights = 30 * (2 * 576 * 64 * (9 + 3) + 3 * 576 * 1536)
    linear = max(2 * weights * 1000 / (312e12 * 0.65), 2 * weights / (2.039e12 * 0.8))
    logits = max(2 * 49_152 * 576 / (312e12 * 0.65), 2 * 49_152 * 576 / (2.039e12 * 0.8))
    pairs = 1000 * 1001 / 2
    attention = 4 * 64 * 9 * 30 * pairs / (312e12 * 0.55)
    assert prefill.wall_s == pytest.approx((linear + attention + logits,))
    assert prefill.ended_s == pytest.approx(3e-3 + linear + attention + logits)
    keys = 2 * 30 * 3 * 64 * 2 * 1001 / (2.039e12 * 0.8)
    one = 2 * weights / (2.039e12 * 0.8)
    assert decode.wall_s == pytest.approx((one + logits + keys,))
    assert (decode.lane, decode.num_keys, decode.num_tokens) == (Lane.DECODE, 1001, 1)
    assert prefill.bytes_sent == decode.bytes_sent == {}
    (row,) = result.requests
    assert row.ttft_s == pytest.approx(prefill.ended_s)
    assert row.gaps_ms == pytest.approx((1e3 * (3e-3 + one + logits + keys),))


def test_bytes_of_a_dense_prefill_over_two_ranks() -> None:
    """(P - 1) S k per layer, k = 2 * 3 * 64 * 2 bytes."""
    result = run([request(0.0, 256, 1, 0)], Strategy.RING)
    (step,) = result.steps
    assert step.bytes_sent == {"kv": 30 * 256 * 768}
    assert step.dense_bytes == 30 * 256 * 768


def test_csa_computes_and_fetches_less_of_long_prompts() -> None:
    asked = [request(0.0, 16_000, 1, 0)]
    sparse, dense = (
        run(asked, Strategy.CSPS, attention=kind, stage_tokens=16_384, block_size=64).steps[0]
        for kind in (AttentionKind.CSA, AttentionKind.DENSE)
    )
    assert sparse.density == pytest.approx(density_table(0.95).at(16_000).density)
    assert dense.density is None
    assert sparse.dense_bytes == dense.dense_bytes == sum(dense.bytes_sent.values())
    assert sparse.bytes_sent["kv"] < 0.4 * dense.bytes_sent["kv"]
    assert sparse.compute_s[0] < dense.compute_s[0]


@pytest.mark.parametrize("changes", [{"pipeline": False}, {"decode_moves": DecodeMoves.KV}])
def test_what_is_taken_from_csps_costs_time(changes: dict[str, object]) -> None:
    asked = [request(0.0, 40_000, 20, 0)]
    whole = run(asked, Strategy.CSPS, layout=Layout.SP, stage_tokens=65_536)
    less = run(asked, Strategy.CSPS, layout=Layout.SP, stage_tokens=65_536, **changes)
    assert less.requests[0].response_s > whole.requests[0].response_s


def test_lanes_that_take_turns_hold_decode_up() -> None:
    asked = [request(0.0, 64, 200, 0), request(0.02, 30_000, 1, 5000)]
    apart, turns = (
        max(run(asked, Strategy.RING, stage_tokens=32_768, separate_decode=on).requests[-1].gaps_ms)
        for on in (True, False)
    )
    assert turns > 1.5 * apart


counts = st.integers(0, 4096)


@FEW
@given(counts, counts, counts, st.sampled_from(Layout), st.sampled_from([(8, 4), (32, 1), (1, 32)]))
def test_more_to_do_never_takes_less_time(
    tokens: int, pairs: int, keys: int, layout: Layout, mesh: tuple[int, int]
) -> None:
    assert isinstance(SPREAD, AnalyticCluster)
    costs = HeadsCosts(make_roofline(SPREAD, BIG), Fabric(SPREAD, *mesh))
    base = StepShape(tokens + 1, 1, pairs, keys)
    less = costs.of_shape(base, layout)
    assert less.exposed_comm_s <= less.comm_s
    for more in (
        base._replace(num_tokens=tokens + 33),
        base._replace(num_pairs=pairs + 1000),
        base._replace(num_keys=keys + 1000),
    ):
        assert costs.of_shape(more, layout).wall_s >= less.wall_s


@FEW
@given(st.integers(1, 64), st.integers(0, 100_000), st.sampled_from(Layout))
def test_decode_over_more_keys_takes_longer(tokens: int, keys: int, layout: Layout) -> None:
    assert isinstance(SPREAD, AnalyticCluster)
    fabric = Fabric(SPREAD, 8, 4)
    costs = DecodeCosts(make_roofline(SPREAD, BIG), fabric, DecodeMoves.QUERIES)
    spread = Spread(1 / 8, -(-tokens // 8), 7 * tokens, 7 / 8)
    less, more = (
        costs.cost(StepShape(tokens, tokens, 0, tokens * (keys + extra)), layout, spread)
        for extra in (1, 1001)
    )
    assert more.wall_s > less.wall_s


def test_networks_between_nodes_are_shared() -> None:
    """8 GPUs of a node share 50 GB/s at 0.8; within a node each has 300 GB/s at 0.75."""
    assert isinstance(SPREAD, AnalyticCluster)
    alone, far = Fabric(SPREAD, 8, 1), Fabric(SPREAD, 32, 1)
    assert alone.all_to_all(alone.sequence, 1e9) == pytest.approx(1e9 / 225e9)
    assert far.all_to_all(far.sequence, 31e9) == pytest.approx(24e9 / 5e9)
    assert far.ring(far.sequence, 1e9) == pytest.approx(1e9 / 40e9)
    tensor = Fabric(SPREAD, 8, 4)
    assert tensor.ring(tensor.sequence, 1e9) == pytest.approx(1e9 / 10e9)
    assert tensor.all_reduce(tensor.tensor, 1e9) == pytest.approx(1.5e9 / 225e9)


def test_every_shipped_file_can_be_read() -> None:
    assert {"a100x8", "a100x32", "h200x8", "cpu2"} <= set(shipped("clusters"))
    for name in shipped("clusters"):
        assert load_cluster(name).name == name
    for name in shipped("models"):
        load_model(name)


@pytest.mark.parametrize(
    ("name", "billions", "kv_kib"),
    [
        ("llama-3.1-8b", 8.03, 128),
        ("llama-3.1-70b", 70.6, 320),
        ("mistral-7b", 7.24, 128),
        ("yi-34b", 34.4, 240),
        ("qwen3-32b", 32.8, 256),
        ("smollm2-135m", 0.1345, 22.5),
    ],
)
def test_shapes_are_those_of_the_models(name: str, billions: float, kv_kib: float) -> None:
    model = load_model(name)
    assert model.weight_bytes == pytest.approx(2e9 * billions, rel=0.005)
    assert model.kv_token_bytes(1) == kv_kib * 1024
    assert load_model(name, WeightType.FP8).layer_bytes == model.layer_bytes / 2


def test_density_follows_its_table() -> None:
    table = density_table(0.95)
    assert table.at(4095) == EVERYTHING
    assert table.at(8000).density == 0.2904
    assert 0.2904 < table.at(6000).density < 0.4195
    assert table.at(10**6) == table.at(32_000)
    assert density_table(1.0).at(100_000) == EVERYTHING
