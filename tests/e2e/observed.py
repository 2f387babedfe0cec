"""A server that is watched in every way, and the OTLP receiver that it sends spans to."""

import contextlib
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from csps.records.rows import STEPS_FILE
from tests.e2e.harness import RPC_TIMEOUT_S, Running, serve


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans it gets."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def Export(  # noqa: N802  (a gRPC method's name)
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


@dataclass(frozen=True)
class Observed:
    """`folder` has the step log."""

    server: Running
    folder: Path
    receiver: Receiver

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Samples of the coordinator and its ranks, by name and labels."""
        ranks = re.findall(r"rank \d: metrics at\s+(\S+)", self.server.log)
        assert len(ranks) == 2
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for url in (self.server.server.metrics_url, *ranks)
            for sample in _scrape(url)
        }


def _scrape(url: str) -> Iterator[Sample]:
    with urllib.request.urlopen(url, timeout=RPC_TIMEOUT_S) as response:
        for family in text_string_to_metric_families(response.read().decode()):
            yield from family.samples


@contextlib.contextmanager
def observe(model: Path, folder: Path) -> Iterator[Observed]:
    """Two ranks; prompts of 256 tokens and more are prefilled sparsely."""
    receiver = Receiver()
    otlp = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, otlp)
    port = otlp.add_insecure_port("127.0.0.1:0")
    otlp.start()
    try:
        with serve(
            *("--model", str(model), "--workers", "2", "--dtype", "float32", "--layout", "sp"),
            *("--block-size", "16", "--long-tokens", "128", "--stage-tokens", "512"),
            *("--attention", "csa", "--csa-min-tokens", "256"),
            *("--step-log", str(folder / STEPS_FILE), "--metrics-port", "0"),
            *("--otlp-endpoint", f"http://127.0.0.1:{port}"),
        ) as running:
            yield Observed(running, folder, receiver)
    finally:
        otlp.stop(None)
