"""`csps replay` against a real server: what is recorded is what the trace asked for."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csps.records.rows import REQUESTS_FILE, Status, read_requests, read_steps
from csps.records.run import RUN_FILE, read_run
from csps.replay.capacity import CAPACITY_FILE
from csps.trace.schema import Trace, TraceRequest, write_trace
from tests.e2e.harness import Running, eventually, is_idle, serve

BLOCK = 64  # a KV block too
TIMEOUT_S = 120.0
# The second begins with the first's first two blocks; the third shares nothing.
REQUESTS = (
    TraceRequest(0.0, 200, 5, (1, 2, 3, 4), session=0),
    TraceRequest(0.8, 130, 3, (1, 2, 9), session=0, turn=1),
    TraceRequest(0.8, 90, 4, (7, 8), session=1),
)


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    with serve("--model", str(tiny), "--strategy", "ring", "--workers", "2") as running:
        yield running


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    write_trace(path, Trace("three", "a test", BLOCK, REQUESTS))
    return path


def start(trace: Path, target: str, out: Path, *flags: str) -> subprocess.Popen[str]:
    words = ["replay", str(trace), "--target", target, "--out", str(out), *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "csps", *words], stderr=subprocess.PIPE, text=True
    )


def run(trace: Path, target: str, out: Path, *flags: str) -> tuple[int, str]:
    """Status and what it said."""
    with start(trace, target, out, *flags) as process:
        _, said = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, said


def test_rows_hold_what_the_trace_asked_for(server: Running, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, said = run(trace, server.target, out, "--speed", "2", "--slo-ttft", "60")
    assert status == 0, said
    rows = sorted(read_requests(out), key=lambda row: int(row.request_id))
    assert [row.status for row in rows] == [Status.DONE] * 3
    assert [row.prompt_tokens for row in rows] == [200, 130, 90]
    assert [row.output_tokens for row in rows] == [5, 3, 4]
    assert [len(row.gaps_ms) for row in rows] == [4, 2, 3]
    assert [row.arrival_s for row in rows] == [0.0, 0.4, 0.4]
    assert [row.cached_tokens for row in rows] == [0, 2 * BLOCK, 0]
    for row in rows:
        assert row.sent_s >= row.arrival_s
        assert 0 <= row.queue_s <= row.ttft_s <= row.response_s
    steps = read_steps(out)
    # Each request computes what is not cached of its prompt, and all its tokens but the last.
    assert sum(step.num_tokens for step in steps) == 200 + 4 + 2 + 2 + 90 + 3
    assert all(0 <= step.started_s <= step.ended_s for step in steps)
    info = read_run(out)
    assert (info.strategy, info.ranks, info.interrupted) == ("ring", 2, False)
    assert info.num_requests == 3
    assert (out / "summary.json").exists()


def test_an_interrupted_run_writes_what_there_is(server: Running, tmp_path: Path) -> None:
    room = server.model().max_model_len - 90
    requests = (
        TraceRequest(0.0, 90, room, (7, 8), session=1),
        replace(REQUESTS[0], arrival_s=0.1),
        TraceRequest(900.0, 90, 4, (7, 8), session=2),
    )
    path, out = tmp_path / "long.jsonl", tmp_path / "run"
    write_trace(path, Trace("long", "a test", BLOCK, requests))
    with start(path, server.target, out) as process:
        first = out / REQUESTS_FILE
        assert eventually(lambda: first.exists() and Status.DONE in first.read_text(), 30.0)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, said
    assert read_run(out).interrupted
    rows = {row.request_id: row for row in read_requests(out)}
    assert {name: row.status for name, row in rows.items()} == {
        "0": Status.UNFINISHED,
        "1": Status.DONE,
    }
    assert eventually(lambda: is_idle(server)), "the server still works for a client that left"


def test_a_folder_that_holds_a_run_is_not_overwritten(
    server: Running, trace: Path, tmp_path: Path
) -> None:
    (tmp_path / RUN_FILE).write_text("{}")
    status, said = run(trace, server.target, tmp_path)
    assert status == 1
    assert "holds a run already" in said
    assert (tmp_path / RUN_FILE).read_text() == "{}"


def test_requests_beyond_the_context_are_named_or_left_out(server: Running, tmp_path: Path) -> None:
    limit = server.model().max_model_len
    blocks = tuple(range(-(-limit // BLOCK)))
    long = TraceRequest(0.0, limit, 2, blocks, session=0)
    path = tmp_path / "trace.jsonl"
    write_trace(path, Trace("long", "a test", BLOCK, (long, REQUESTS[2])))
    status, said = run(path, server.target, tmp_path / "a")
    assert status == 1
    assert f"context of {limit} tokens" in " ".join(said.split())
    status, said = run(path, server.target, tmp_path / "b", "--skip-bad", "--speed", "100")
    assert status == 0, said
    assert read_run(tmp_path / "b").skipped_rows == 1
    assert [row.prompt_tokens for row in read_requests(tmp_path / "b")] == [90]


def test_a_bad_row_is_named_by_its_line(trace: Path, tmp_path: Path) -> None:
    trace.write_text(trace.read_text() + '{"arrival_s": 1.0, "prompt_tokens"')
    status, said = run(trace, "127.0.0.1:1", tmp_path / "run")
    assert status == 1
    assert "line 5" in said


def test_no_server(trace: Path, tmp_path: Path) -> None:
    status, said = run(trace, "127.0.0.1:1", tmp_path / "run")
    assert status == 1
    assert "no server answers at 127.0.0.1:1" in said


def test_capacity_tries_a_run_per_speed_and_says_what_it_found(
    server: Running, trace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "search"
    status, said = run(
        trace, server.target, out, "--find-capacity", "--slo-ttft", "1e-6", "--speed", "80"
    )
    assert status == 1
    assert "missed even at" in said
    record = json.loads((out / CAPACITY_FILE).read_text())
    assert record["speed"] == 0
    assert [(each["speed"], each["met"]) for each in record["tried"]] == [(10.0, False)]
    (folder,) = (each for each in out.iterdir() if each.is_dir())
    assert len(read_requests(folder)) == 3


def test_capacity_needs_an_objective(trace: Path, tmp_path: Path) -> None:
    status, said = run(trace, "127.0.0.1:1", tmp_path / "run", "--find-capacity")
    assert status == 1
    assert "--slo-tbt" in said
