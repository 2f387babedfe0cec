"""Metrics and spans of a real server, for what it really did."""

import json
import re
from collections import defaultdict
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from csps.v1 import generation_pb2 as pb
from tests.e2e.harness import eventually, is_idle, prompt, request
from tests.e2e.observed import Observed

ROOT = Path(__file__).parents[2]
OUTPUT = 12
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Moved(defaultdict[str, float]):
    """By how much each series moved, and each name over all its labels."""


@pytest.fixture(scope="module")
def moved(observed: Observed) -> Moved:
    """A sparse prompt twice, a short one, one that is refused and one whose client leaves."""
    server = observed.server
    before, lanes = observed.metrics(), server.info().lanes
    long = prompt(1100, seed=31)
    for ids in (long, long, prompt(60, seed=32)):
        server.generate(request(ids, max_tokens=OUTPUT, ignore_eos=True))
    with pytest.raises(grpc.RpcError):
        server.generate(request(prompt(20), max_tokens=-1))
    call = server.open(request(prompt(20, seed=33), max_tokens=1900, ignore_eos=True))
    next(call)
    call.cancel()
    assert eventually(lambda: is_idle(server))
    found = Moved(float)
    for (name, labels), value in observed.metrics().items():
        change = value - before.get((name, labels), 0.0)
        found[name] += change
        found[f"{name} {' '.join(value for _, value in sorted(labels))}"] += change
    found["tokens"] = sum(
        new.tokens - old.tokens for old, new in zip(lanes, server.info().lanes, strict=True)
    )
    return found


def test_requests_are_counted(moved: Moved) -> None:
    assert moved["csps:request_success_total length"] == 3
    assert moved["csps:request_failure_total INVALID_ARGUMENT"] == 1
    assert moved["csps:request_failure_total CANCELLED"] == 1
    assert moved["csps:e2e_request_latency_seconds_count"] == 3
    assert moved["csps:request_prompt_tokens_sum"] == 2 * 1100 + 60
    assert moved["csps:request_generation_tokens_sum"] == 3 * OUTPUT
    begun = moved["csps:time_to_first_token_seconds_count"]  # the client that left may have a token
    assert begun in (3, 4)
    drawn = moved["csps:generation_tokens_total"]
    assert drawn >= 3 * OUTPUT
    assert moved["csps:inter_token_latency_seconds_count"] == drawn - begun
    assert moved["csps:prompt_tokens_total"] in (2 * 1100 + 60, 2 * 1100 + 80)
    assert moved["csps:csa_density_count"] == 2
    assert 0.9 <= moved["csps:csa_recall_sum"] / moved["csps:csa_recall_count"] <= 1
    assert moved["csps:prefix_cache_hits_total"] >= 1088
    assert moved["csps:prefix_cache_queries_total"] >= 2 * 1100 + 60


def test_steps_are_counted_by_coordinator_and_ranks(moved: Moved) -> None:
    assert moved["csps:step_tokens_total"] == moved["tokens"]
    for name in ("compute_seconds_total", "comm_seconds_total", "exposed_comm_seconds_total"):
        assert moved[f"csps:{name}"] > 0
        assert moved[f"csps:{name}"] == pytest.approx(moved[f"csps:worker_{name}"])
    assert moved["csps:sent_bytes_total"] == moved["csps:worker_sent_bytes_total"]
    assert moved["csps:sent_bytes_total"] == moved["csps:worker_received_bytes_total"]
    assert moved["csps:worker_step_seconds_count"] == 2 * moved["csps:step_seconds_count"]


def test_gauges_say_what_is_now(observed: Observed) -> None:
    server = observed.server
    call = server.open(request(prompt(600, seed=34), max_tokens=1400, ignore_eos=True))
    assert eventually(lambda: server.load().kv_usage > 0)
    now = observed.metrics()
    assert now["csps:num_requests_running", frozenset()] == 1
    for rank in ("0", "1"):
        assert 0 < now["csps:kv_cache_usage_perc", frozenset({("rank", rank)})] < 1
        pages = now["csps:worker_kv_pages", frozenset({("rank", rank)})]
        assert pages >= server.info().blocks_per_rank
    call.cancel()
    assert eventually(lambda: is_idle(server))
    assert observed.metrics()["csps:num_requests_running", frozenset()] == 0


@pytest.mark.usefixtures("moved")
def test_dashboard_and_docs_name_what_is_exported(observed: Observed) -> None:
    exported = {name for name, _ in observed.metrics()}
    dashboard = json.loads((ROOT / "deploy/grafana.json").read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    shown = set(re.findall(r"(?:csps:|process_)\w+", " ".join(expressions)))
    assert len(shown) > 20
    assert shown <= exported
    documented = set(re.findall(r"`(csps:\w+)", (ROOT / "docs/operations.md").read_text()))
    ours = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in exported
        if name.startswith("csps:") and not name.endswith("_created")
    }
    assert documented - {"csps:worker_device_memory_bytes"} == ours


def attributes(span: Span) -> dict[str, object]:
    return {
        item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes
    }


def spans_of(observed: Observed, request_id: str) -> tuple[Span, list[Span]]:
    """The request's span and its children."""

    def roots() -> list[Span]:
        return [
            span
            for span in observed.receiver.spans
            if attributes(span).get("csps.request_id") == request_id
        ]

    assert eventually(lambda: bool(roots()), timeout=30)
    (root,) = roots()
    children = [span for span in observed.receiver.spans if span.parent_span_id == root.span_id]
    return root, sorted(children, key=lambda span: span.start_time_unix_nano)


def test_spans_of_a_request(observed: Observed) -> None:
    message = request(
        prompt(1100, seed=35), max_tokens=OUTPUT, ignore_eos=True, request_id="traced"
    )
    metadata = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"),)
    for _ in observed.server.stub.Generate(message, metadata=metadata, timeout=60):
        pass
    root, children = spans_of(observed, "traced")
    assert root.trace_id.hex() == TRACE_ID
    assert root.parent_span_id.hex() == PARENT_ID
    found = attributes(root)
    assert found["gen_ai.usage.input_tokens"] == 1100
    assert found["gen_ai.usage.output_tokens"] == OUTPUT
    assert found["csps.cached_tokens"] == 0
    assert found["rpc.grpc.status"] == "OK"
    assert [v.string_value for v in found["gen_ai.response.finish_reasons"].values] == ["length"]
    assert [span.name for span in children] == ["queue", "prefill", "prefill", "prefill", "decode"]
    queue, *prefills, decode = children
    assert [attributes(span)["csps.tokens"] for span in prefills] == [512, 512, 76]
    assert attributes(prefills[0])["csps.layout"] == "sp"
    assert attributes(decode)["csps.tokens"] == OUTPUT
    assert queue.start_time_unix_nano == root.start_time_unix_nano
    for span in children:
        assert span.trace_id == root.trace_id
        assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano


@pytest.mark.parametrize(
    ("how", "status"), [("cancel", "CANCELLED"), ("deadline", "DEADLINE_EXCEEDED")]
)
def test_spans_of_a_request_that_fails(observed: Observed, how: str, status: str) -> None:
    message = request(prompt(20), max_tokens=1900, ignore_eos=True, request_id=how)
    call = observed.server.open(message, timeout=60 if how == "cancel" else 0.5)
    if how == "cancel":
        next(call)
        call.cancel()
    with pytest.raises(grpc.RpcError):
        list(call)
    root, children = spans_of(observed, how)
    assert attributes(root)["rpc.grpc.status"] == status
    assert root.status.code == Status.STATUS_CODE_ERROR
    assert children[0].name == "queue"


def test_an_abort_is_no_failure(observed: Observed) -> None:
    message = request(prompt(20), max_tokens=1900, ignore_eos=True, request_id="aborted")
    call = observed.server.open(message)
    next(call)
    observed.server.abort("aborted")
    *_, last = call
    assert last.complete.finish_reason == pb.FINISH_REASON_ABORT
    root, _ = spans_of(observed, "aborted")
    assert attributes(root)["rpc.grpc.status"] == "OK"
