"""Flags of observation that cannot be obeyed, and a receiver of spans that does not answer."""

import asyncio
import socket
import sys
import time

import pytest
from prometheus_client import CollectorRegistry

from csps.coordinator.live import LiveRequest
from csps.coordinator.server import Server
from csps.coordinator.tracing import Tracer
from csps.core.config import ServerConfig, WorkerSetup
from csps.core.errors import ConfigError
from csps.rpc.http_metrics import MetricsServer
from csps.sched.sequence import Sequence


def test_a_port_in_use() -> None:
    first = MetricsServer(CollectorRegistry(), "127.0.0.1", 0)
    port = int(first.url.split(":")[2].partition("/")[0])
    with pytest.raises(ConfigError, match=rf"--metrics-port: cannot listen on 127.0.0.1:{port}"):
        MetricsServer(CollectorRegistry(), "127.0.0.1", port)
    first.close()


@pytest.mark.parametrize("endpoint", ["localhost:4317", "ftp://host:1", "http://"])
def test_an_endpoint_that_is_no_url(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="--otlp-endpoint: expected a URL such as http://"):
        Tracer(endpoint)


def test_opentelemetry_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "csps.coordinator.tracing")

    async def serve() -> None:
        config = ServerConfig(WorkerSetup("none"), otlp_endpoint="http://127.0.0.1:4317")
        await Server(config, start_workers=False).serve(lambda *_: None)

    with pytest.raises(ConfigError, match=r"--otlp-endpoint: .* pip install 'csps\[otel\]'"):
        asyncio.run(serve())


def test_a_receiver_that_never_answers_holds_nothing_up() -> None:
    """It takes connections, and no more; by default the SDK would wait 30 seconds for it."""

    async def scenario(port: int) -> None:
        tracer = Tracer(f"http://127.0.0.1:{port}")
        for number in range(3000):
            live = LiveRequest(str(number), Sequence(number, (1,)), time.monotonic())
            live.ended = time.monotonic()
            tracer.on_end(live)
        async with asyncio.timeout(20):
            await tracer.close()

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        asyncio.run(scenario(silent.getsockname()[1]))
