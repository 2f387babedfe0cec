"""Prometheus metrics of the coordinator. docs/operations.md lists them.

Names follow vLLM's under the prefix `csps:`, so that its dashboards and alerts need little change.
Counters count from the start of the server and are never reset.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from csps.coordinator.live import LiveRequest
from csps.coordinator.observer import Observer
from csps.coordinator.sparse import SparseSummary
from csps.coordinator.steps import FinishedStep
from csps.core.errors import CspsError
from csps.rpc.interceptors import status_of
from csps.sched.scheduler import Scheduler

PREFIX = "csps:"
# A long prompt's first token may take minutes, a step or a short one's milliseconds.
_LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 300, 600)
_REQUEST_S = (*_LONG_S, 1200, 3600)
_GAP_S = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 10)
_TOKENS = tuple(4**n for n in range(2, 11))  # 16 to 1,048,576
_SHARES = tuple(n / 20 for n in range(1, 20))
_RECALLS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99)


class Metrics(Observer):
    """Observes the engine into `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _LONG_S
        )
        self._gap = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a request.", _GAP_S
        )
        self._latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the end, of requests that had one.",
            _REQUEST_S,
        )  # fmt: skip
        self._queue = self._histogram(
            "request_queue_time_seconds", "From arrival to the first step.", _LONG_S
        )
        self._request_prompt = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", _TOKENS
        )
        self._request_output = self._histogram(
            "request_generation_tokens", "Output tokens of a request.", _TOKENS
        )
        self._prompt_tokens = self._counter(
            "prompt_tokens", "Tokens of prompts that are prefilled, cached ones included."
        )
        self._output_tokens = self._counter("generation_tokens", "Tokens drawn.")
        self._success = self._counter(
            "request_success", "Requests that ended well.", "finished_reason"
        )
        self._failure = self._counter(
            "request_failure", "Requests that ended with an error, by gRPC status.", "code"
        )
        self._step = self._histogram(
            "step_seconds", "A step, on its slowest rank.", _LONG_S, "lane", "layout"
        )
        self._step_tokens = self._counter("step_tokens", "Tokens computed.", "lane", "layout")
        self._compute = self._counter("compute_seconds", "Computing, sum over ranks.", "lane")
        self._comm = self._counter(
            "comm_seconds", "A transfer was under way, sum over ranks.", "lane"
        )
        self._exposed = self._counter(
            "exposed_comm_seconds", "Of that, with nothing to compute, sum over ranks.", "lane"
        )
        self._bytes = self._counter("sent_bytes", "Between ranks, sum over ranks.", "lane", "kind")
        self._density = self._histogram(
            "csa_density", "Kept share of a sparse prefill's attention.", _SHARES
        )
        self._recall = self._histogram(
            "csa_recall", "Mean recall that a sparse prefill's probes measured.", _RECALLS
        )

    def watch(self, scheduler: Scheduler) -> None:
        """Read these at every scrape."""
        self.registry.register(_SchedulerCollector(scheduler))

    def on_step(self, step: FinishedStep) -> None:
        lane, layout = step.plan.lane.value, step.plan.layout.value
        stats = [result.stats for result in step.results]
        self._step.labels(lane, layout).observe(max(one.wall_s for one in stats))
        self._step_tokens.labels(lane, layout).inc(step.plan.num_tokens)
        self._compute.labels(lane).inc(sum(one.compute_s for one in stats))
        self._comm.labels(lane).inc(sum(one.comm_s for one in stats))
        self._exposed.labels(lane).inc(sum(one.exposed_comm_s for one in stats))
        for one in stats:
            for kind, num_bytes in one.bytes_sent.items():
                self._bytes.labels(lane, kind).inc(num_bytes)

    def on_token(self, live: LiveRequest, gap_s: float | None) -> None:
        if gap_s is None:
            self._ttft.observe(live.first_token - live.received)
            self._prompt_tokens.inc(len(live.seq.prompt_ids))
        else:
            self._gap.observe(gap_s)
        self._output_tokens.inc()

    def on_end(self, live: LiveRequest) -> None:
        if live.first_scheduled:
            self._queue.observe(live.first_scheduled - live.received)
        if live.finish is None:
            self._failure.labels(live.status).inc()
            return
        self._success.labels(live.finish.value).inc()
        self._latency.observe(live.ended - live.received)
        self._request_prompt.observe(len(live.seq.prompt_ids))
        self._request_output.observe(len(live.seq.output_ids))
        self._note_sparse(live.sparse)

    def on_refused(self, error: CspsError) -> None:
        self._failure.labels(status_of(error).name).inc()

    def _note_sparse(self, sparse: SparseSummary) -> None:
        if sparse.causal_pairs:
            self._density.observe(sparse.kept_pairs / sparse.causal_pairs)
        if sparse.num_probes:
            self._recall.observe(sparse.recall_sum / sparse.num_probes)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)


class _SchedulerCollector(Collector):
    """What the scheduler and its ledger know, read by the thread of a scrape.

    They change meanwhile, but each value is a number of its own.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        scheduler, ledger = self._scheduler, self._scheduler.ledger
        running = scheduler.num_prefilling + scheduler.num_running
        yield _gauge("num_requests_running", "Requests prefilled or decoded now.", running)
        yield _gauge(
            "num_requests_waiting", "Requests before their first step.", scheduler.num_waiting
        )
        yield _gauge("num_tokens_waiting", "Their prompt tokens.", scheduler.num_waiting_tokens)
        usage = GaugeMetricFamily(
            PREFIX + "kv_cache_usage_perc", "KV pages of live requests, 1 is full.", labels=["rank"]
        )
        for rank in range(ledger.num_ranks):
            usage.add_metric([str(rank)], ledger.used_pages(rank) / ledger.pages_per_rank)
        yield usage
        stats = ledger.cache_stats
        yield _count("prefix_cache_queries", "Tokens of requests that started.", stats.query_tokens)
        yield _count("prefix_cache_hits", "Of them, those that were cached.", stats.hit_tokens)
        yield _count("prefix_cache_evictions", "KV blocks evicted.", stats.num_evictions)
        yield _count(
            "num_preemptions", "Times a request gave its KV back.", scheduler.num_preemptions
        )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _count(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)
