"""What a load balancer or an operator's tool asks: health, reflection, model, server, load."""

from pathlib import Path

import grpc
import pytest
import torch
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import csps
from csps.bench.server import ServerProcess
from csps.core.config import STAGE_TOKENS
from csps.v1 import generation_pb2 as pb
from tests.e2e.harness import (
    NOT_SERVING,
    RPC_TIMEOUT_S,
    SERVING,
    Client,
    Running,
    Watch,
    assert_clean,
    eventually,
    free_port,
    prompt,
    request,
)

SERVICE, ADMIN = "csps.v1.Generation", "csps.v1.Admin"
METHODS = {"Generate", "Abort", "GetModelInfo", "GetServerInfo", "GetLoad"}


def check(channel: grpc.Channel, service: str = "") -> int:
    message = health_pb2.HealthCheckRequest(service=service)
    stub = health_pb2_grpc.HealthStub(channel)
    return stub.Check(message, timeout=RPC_TIMEOUT_S, wait_for_ready=True).status


def test_not_serving_until_the_ranks_and_their_device_are_known(tiny: Path) -> None:
    target = f"127.0.0.1:{free_port()}"
    server = ServerProcess("--model", str(tiny), "--port", target.rpartition(":")[2])
    watches = [Watch(target), Watch(target, SERVICE)]
    server.start()
    client = Client(target)
    try:
        assert check(client.channel) == NOT_SERVING
        assert check(client.channel, SERVICE) == NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            client.generate(request([5]))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "starting" in caught.value.details()
        server.wait_ready()
        for name in ("", SERVICE, ADMIN):
            assert check(client.channel, name) == SERVING
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert client.info().stage_tokens == STAGE_TOKENS[device]
        assert eventually(lambda: all(w.seen == [NOT_SERVING, SERVING] for w in watches))
        assert server.stop() == 0
        assert eventually(lambda: all(w.seen[2:] == [NOT_SERVING] for w in watches))
        assert_clean(server.log)
    finally:
        client.close()
        server.__exit__(None, None, None)


def test_health_of_an_unknown_service(two_ranks: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        check(two_ranks.channel, "csps.v1.Nothing")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_service_and_its_methods(two_ranks: Running) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(two_ranks.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    listed, described = stub.ServerReflectionInfo(iter(asked), timeout=RPC_TIMEOUT_S)
    names = {service.name for service in listed.list_services_response.service}
    assert names == {
        SERVICE,
        ADMIN,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(data)
        for data in described.file_descriptor_response.file_descriptor_proto
    ]
    methods = {m.name for file in files for service in file.service for m in service.method}
    assert methods == METHODS


def test_model_info(two_ranks: Running, tiny: Path) -> None:
    model = two_ranks.model()
    assert model.model == tiny.name
    assert model.architecture == "LlamaForCausalLM"
    assert model.vocab_size == 400
    assert model.max_model_len == 2048
    assert list(model.eos_token_ids) == [2]
    assert not model.has_chat_template
    assert model.dtype == "float32"
    hidden, intermediate, layers = 96, 160, 3
    layer = hidden * (96 + 48 + 48 + 96) + 3 * hidden * intermediate + 2 * hidden
    assert model.num_parameters == layers * layer + 2 * 400 * hidden + hidden


def test_server_info_counts_what_the_lanes_did(two_ranks: Running, tiny: Path) -> None:
    before = two_ranks.info()
    assert before.version == csps.__version__
    assert (before.sp, before.tp, before.block_size) == (2, 1, 16)
    assert (before.long_tokens, before.stage_tokens) == (128, 512)
    assert before.blocks_per_rank > 0
    assert (before.model, before.dtype, before.max_model_len) == (tiny.name, "float32", 2048)
    assert (before.max_running, before.max_waiting_tokens) == (64, 1_000_000)
    assert (before.csa.min_recall, before.csa.wire, before.csa.pipeline) == (0.9, "model", True)
    assert len(before.attention_backends) == 2
    most = {backend.split()[0] for backend in before.attention_backends}
    assert most <= {"torch", "triton", "flashinfer"}, "what auto came to"
    assert before.uptime_s > 0
    assert [lane.lane for lane in before.lanes] == ["prefill", "decode"]
    two_ranks.generate(request(prompt(1000), max_tokens=10, ignore_eos=True))
    after = two_ranks.info()
    assert after.uptime_s > before.uptime_s
    prefill, decode = (
        (new.steps - old.steps, new.tokens - old.tokens)
        for old, new in zip(before.lanes, after.lanes, strict=True)
    )
    assert prefill == (2, 1000)
    assert decode == (9, 9)
    for lane in after.lanes:
        assert lane.wall_s > 0
        assert lane.compute_s > 0
        assert lane.comm_s >= lane.exposed_comm_s >= 0
    # One shift of the KV of 1,000 tokens: K and V, 3 layers, 3 heads of 16, fp32.
    kv = after.lanes[0].bytes_sent["kv"] - before.lanes[0].bytes_sent["kv"]
    assert kv > 0
    assert kv % (2 * 3 * 16 * 4) == 0
    assert after.lanes[1].bytes_sent["query"] > before.lanes[1].bytes_sent["query"]


def test_load_while_requests_run(two_ranks: Running) -> None:
    client = Client(two_ranks.target)
    calls = [
        client.open(request(prompt(600, seed=i), max_tokens=1400, ignore_eos=True))
        for i in range(3)
    ]
    assert eventually(lambda: two_ranks.load().num_running == 3)
    load, info = two_ranks.load(), two_ranks.info()
    assert load.kv_usage > 0
    assert sum(info.used_blocks_by_rank) >= 3 * 600 // 16
    assert max(info.used_blocks_by_rank) - min(info.used_blocks_by_rank) <= 9  # 3 per sequence
    for call in calls:
        call.cancel()
    assert eventually(lambda: two_ranks.load() == pb.GetLoadResponse())
    client.close()
