"""Prometheus metrics of one rank. docs/operations.md lists them."""

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from csps.core.plan import StepResult

PREFIX = "csps:worker_"
_STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class WorkerMetrics:
    """What a rank does, each series with the rank as a label. Counters are never reset."""

    def __init__(self, rank: int) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._rank = str(rank)
        self._step = Histogram(
            PREFIX + "step_seconds",
            "A step on this rank.",
            ("rank", "lane"),
            buckets=_STEP_S,
            registry=self.registry,
        )
        self._compute = self._counter("compute_seconds", "Computing.", "lane")
        self._comm = self._counter("comm_seconds", "A transfer of it was under way.", "lane")
        self._exposed = self._counter(
            "exposed_comm_seconds", "Of that, with nothing to compute.", "lane"
        )
        self._sent = self._counter("sent_bytes", "To other ranks.", "lane", "kind")
        self._received = self._counter("received_bytes", "From other ranks.", "lane", "kind")
        self._pages = Gauge(
            PREFIX + "kv_pages", "KV pages of its pool.", ("rank",), registry=self.registry
        )
        if torch.cuda.is_available():
            memory = Gauge(
                PREFIX + "device_memory_bytes",
                "Memory of its GPU that it has allocated.",
                ("rank",),
                registry=self.registry,
            )
            memory.labels(self._rank).set_function(torch.cuda.memory_allocated)

    def ready(self, num_pages: int) -> None:
        self._pages.labels(self._rank).set(num_pages)

    def step(self, result: StepResult) -> None:
        """A step that ended; called in the lanes' threads."""
        rank, lane, stats = self._rank, result.lane.value, result.stats
        self._step.labels(rank, lane).observe(stats.wall_s)
        self._compute.labels(rank, lane).inc(stats.compute_s)
        self._comm.labels(rank, lane).inc(stats.comm_s)
        self._exposed.labels(rank, lane).inc(stats.exposed_comm_s)
        for kind, num_bytes in stats.bytes_sent.items():
            self._sent.labels(rank, lane, kind).inc(num_bytes)
        for kind, num_bytes in stats.bytes_received.items():
            self._received.labels(rank, lane, kind).inc(num_bytes)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ("rank", *labels), registry=self.registry)
