"""Every strategy behind the same interface: same tokens, its own lanes and layouts."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import grpc
import pytest

from csps.bench.server import ServerProcess
from csps.core.errors import UnavailableError
from csps.records.rows import STEPS_FILE, read_steps
from csps.v1 import generation_pb2 as pb
from tests.e2e.harness import eventually, is_idle, prompt, request, serve

FLAGS = {
    "csps": ("--prefill-ranks", "0,1", "--decode-ranks", "2"),
    "ring": (),
    "sarathi": ("--token-budget", "100"),
    "shift": (),
}
PROMPTS = [prompt(n, seed=n) for n in (5, 300, 900)]


@pytest.fixture(scope="module")
def answers(tiny: Path) -> list[list[int]]:
    """Greedy tokens of one rank."""
    with serve("--model", str(tiny), "--dtype", "float32") as server:
        return [server.generate(request(p, max_tokens=20)).token_ids for p in PROMPTS]


@pytest.mark.parametrize("strategy", FLAGS)
def test_same_tokens_by_every_strategy(tiny: Path, answers: list[list[int]], strategy: str) -> None:
    flags = ("--model", str(tiny), "--dtype", "float32", "--workers", "3", "--warm-up")
    with serve(*flags, "--strategy", strategy, *FLAGS[strategy]) as server:
        assert "warmed up" in server.log
        found = [server.generate(request(p, max_tokens=20)).token_ids for p in PROMPTS]
        assert found == answers
        info = server.info()
        assert info.strategy == strategy
        lanes = {lane.lane: lane for lane in info.lanes}
        if strategy in ("csps", "ring"):
            assert set(lanes) == {"prefill", "decode"}
            assert info.attention == ("csa" if strategy == "csps" else "dense")
        else:
            assert set(lanes) == {"mixed"}
            layouts = {layout.layout: layout for layout in lanes["mixed"].layouts}
            assert set(layouts) <= {"sp", "tp"}
            if strategy == "sarathi":
                assert set(layouts) == {"tp"}
            else:  # its costs were measured at start
                assert all(layout.predicted_s > 0 for layout in layouts.values())
        assert eventually(lambda: is_idle(server))


def test_sparse_attention_where_kv_is_by_head(tiny: Path) -> None:
    message = request(prompt(300))
    message.attention.CopyFrom(pb.AttentionParams(kind=pb.ATTENTION_KIND_CSA))
    with serve("--model", str(tiny), "--strategy", "sarathi", "--workers", "2") as server:
        with pytest.raises(grpc.RpcError) as caught:
            server.generate(message)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "attention.kind" in caught.value.details()


def test_steps_are_logged(tiny: Path, tmp_path: Path) -> None:
    """What the log says of steps is what the server counts."""
    path = tmp_path / STEPS_FILE
    flags = ("--model", str(tiny), "--strategy", "shift", "--workers", "2")
    with serve(*flags, "--step-log", str(path)) as server:
        server.generate(request(prompt(700), max_tokens=5, ignore_eos=True))
        (lane,) = server.info().lanes
    steps = read_steps(tmp_path)
    assert [step.lane for step in steps] == ["mixed"] * lane.steps
    assert sum(step.num_tokens for step in steps) == lane.tokens == 704
    totals = Counter()
    for step in steps:
        assert step.predicted_s[step.layout] == min(step.predicted_s.values())
        assert len(step.wall_s) == 2
        assert -1e-5 < step.ended_s - step.started_s - max(step.wall_s) < 1
        assert step.dense_bytes == sum(step.bytes_sent.values())
        totals.update(step.bytes_sent)
    assert totals == lane.bytes_sent
    assert {len(step.kv_pages) for step in steps} == {1}, "KV by head: the same on all ranks"
    assert steps[-2].kv_pages == (-(-703 // 64),)
    assert steps[-1].kv_pages == (0,)


def test_decode_keeps_its_pace_beside_prefill(tiny: Path, tmp_path: Path) -> None:
    target_s = 0.15
    flags = ("--model", str(tiny), "--workers", "2", "--tbt-target", "150", "--stage-tokens", "256")
    with serve(*flags, "--step-log", str(tmp_path / STEPS_FILE)) as server:
        stream = server.open(request(prompt(20), max_tokens=200, ignore_eos=True))
        next(stream)
        others = [
            server.open(request(prompt(1900, seed=n), max_tokens=1, ignore_eos=True))
            for n in range(8)
        ]
        for other in others:
            list(other)
        list(stream)
        assert server.info().tbt_target_ms == 150
    steps = read_steps(tmp_path)
    prefill = [step for step in steps if step.lane == "prefill"][1:]
    decode = [step.started_s for step in steps if step.lane == "decode"]
    first, last = prefill[0].started_s, prefill[-1].ended_s
    beside = [at for at in decode if first < at < last]
    assert len(beside) > 2
    assert all(b - a > target_s - 0.01 for a, b in pairwise(beside)), "a step came too soon"
    after = [at for at in decode if at > last]
    assert min(b - a for a, b in pairwise(after)) < target_s, "nothing to keep pace with any more"


def test_a_step_log_that_cannot_be_written(tiny: Path) -> None:
    server = ServerProcess("--model", str(tiny), "--step-log", "/nowhere/steps.jsonl")
    with pytest.raises(UnavailableError, match="--step-log: /nowhere"), server:
        pass
