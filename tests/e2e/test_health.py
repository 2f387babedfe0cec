"""Health, reflection and the calls that tell about a server."""

import threading

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from csps.bench.server import ServerProcess
from tests.e2e.harness import Running, eventually, request

SERVICE = "csps.v1.Generation"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_check_and_reflection(two_ranks: Running) -> None:
    health = health_pb2_grpc.HealthStub(two_ranks.channel)
    for name in ("", SERVICE):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
        assert answer.status == SERVING
    services = ProtoReflectionDescriptorDatabase(two_ranks.channel).get_services()
    assert {SERVICE, "grpc.health.v1.Health"} <= set(services)


def test_watch_sees_the_server_stop(tiny) -> None:
    seen: list[int] = []
    with ServerProcess("--model", str(tiny), "--dtype", "float32") as server:
        channel = grpc.insecure_channel(server.target)
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE), timeout=60
        )

        def follow() -> None:
            try:
                for answer in watch:
                    seen.append(answer.status)
            except grpc.RpcError:
                return

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        assert eventually(lambda: seen == [SERVING])
        assert server.stop() == 0
        thread.join(10)
        channel.close()
    assert seen == [SERVING, NOT_SERVING]


def test_what_the_server_tells(two_ranks: Running) -> None:
    model, info = two_ranks.model(), two_ranks.info()
    assert (model.architecture, model.vocab_size) == ("LlamaForCausalLM", 400)
    assert (model.max_model_len, model.dtype) == (2048, "float32")
    assert not model.has_chat_template
    assert model.num_parameters > 0
    assert (info.sp, info.tp, info.block_size, info.long_tokens) == (2, 1, 16, 128)
    before = {lane.lane: lane.tokens for lane in info.lanes}
    two_ranks.generate(request(range(3, 303), max_tokens=5, ignore_eos=True))
    after = {lane.lane: lane.tokens for lane in two_ranks.info().lanes}
    assert after["prefill"] - before["prefill"] == 300
    assert after["decode"] - before["decode"] == 4
