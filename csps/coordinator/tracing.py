"""OpenTelemetry spans of requests; imported only where an endpoint is given.

A request's spans are made when it has ended, from the times that were noted anyway, in a thread of
their own; a bounded queue and another thread stand between them and the receiver.
"""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from csps import __version__
from csps.coordinator.live import LiveRequest
from csps.coordinator.observer import Observer
from csps.core.errors import ConfigError

MAX_QUEUED_SPANS = 8192
EXPORT_TIMEOUT_S = 5
EXPORT_EVERY_S = 1
FLUSH_S = 2.0  # that a stopping server gives to spans not sent yet


class Tracer(Observer):
    """Sends the spans of every request to an OTLP gRPC receiver.

    A receiver that is slow or gone costs spans, never time. ConfigError if `endpoint` is no URL.
    """

    def __init__(self, endpoint: str) -> None:
        if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).netloc:
            raise ConfigError(
                f"--otlp-endpoint: expected a URL such as http://localhost:4317, got {endpoint!r}"
            )
        self._exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        resource = Resource.create({"service.name": "csps", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                self._exporter,
                max_queue_size=MAX_QUEUED_SPANS,
                schedule_delay_millis=1000 * EXPORT_EVERY_S,
            )
        )
        self._tracer = self._provider.get_tracer("csps", __version__)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spans")

    def on_end(self, live: LiveRequest) -> None:
        self._thread.submit(self._record, live, time.time() - time.monotonic())

    async def close(self) -> None:
        """Send what is left, for a moment at most."""
        flush = threading.Thread(target=self._shutdown, name="spans-flush", daemon=True)
        flush.start()
        await asyncio.to_thread(flush.join, FLUSH_S)
        self._exporter.shutdown()

    def _shutdown(self) -> None:
        self._thread.shutdown()
        self._provider.shutdown()

    def _record(self, live: LiveRequest, epoch: float) -> None:
        """`epoch`: of time.monotonic, on the clock of time.time."""
        parent = TraceContextTextMapPropagator().extract(live.trace_context, Context())
        root = self._tracer.start_span(
            "request",
            parent,
            SpanKind.SERVER,
            {
                "csps.request_id": live.request_id,
                "csps.cached_tokens": live.seq.num_cached or 0,
                "gen_ai.usage.input_tokens": len(live.seq.prompt_ids),
                "gen_ai.usage.output_tokens": len(live.seq.output_ids),
                "rpc.grpc.status": live.status,
            },
            start_time=_ns(live.received + epoch),
        )
        if live.finish is not None:
            root.set_attribute("gen_ai.response.finish_reasons", [live.finish.value])
        else:
            root.set_status(Status(StatusCode.ERROR, f"{live.status}: {live.error or ''}"))
        inside = set_span_in_context(root, parent)
        self._child(
            "queue", inside, live.received + epoch, (live.first_scheduled or live.ended) + epoch, {}
        )
        for step in live.prefill_steps:
            attributes = {
                "csps.lane": step.lane.value,
                "csps.step_id": step.step_id,
                "csps.layout": step.layout.value,
                "csps.tokens": step.num_tokens,
            }
            self._child("prefill", inside, step.started, step.ended, attributes)
        if live.first_token:
            tokens = {"csps.tokens": len(live.seq.output_ids)}
            self._child("decode", inside, live.first_token + epoch, live.last_token + epoch, tokens)
        root.end(_ns(live.ended + epoch))

    def _child(
        self, name: str, inside: Context, start: float, end: float, attributes: Attributes
    ) -> None:
        span = self._tracer.start_span(name, inside, attributes=attributes, start_time=_ns(start))
        span.end(_ns(end))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
