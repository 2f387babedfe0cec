"""csps trace, as typed; and what it says of a trace."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from csps.cli import app
from csps.core.errors import ConfigError
from csps.trace.schema import Trace, TraceRequest, read_trace, write_trace
from csps.trace.stats import cached_by_request, trace_stats

ROWS = (
    TraceRequest(0.0, 700, 10, (0, 1), session=0, turn=1),
    TraceRequest(1.0, 512, 20, (9,), session=1, turn=1),
    TraceRequest(1.0, 1100, 30, (0, 2, 3), session=0, turn=2),
    TraceRequest(4.0, 600, 40, (9, 4), session=1, turn=2),
    TraceRequest(5.0, 700, 50, (0, 1), session=0, turn=3),
)
TRACE = Trace("five", "a test", 512, ROWS)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["trace", *map(str, words)])


def test_stats_are_those_of_the_trace() -> None:
    stats = trace_stats(TRACE)
    assert cached_by_request(ROWS, 512) == [0, 0, 512, 512, 700]  # a whole prompt, not 1,024
    assert stats.prefix_hit == pytest.approx((512 + 512 + 700) / 3612)
    assert (stats.requests, stats.sessions, stats.turns_max) == (5, 2, 3)
    assert (stats.prompt_tokens, stats.output_tokens) == (3612, 150)
    assert (stats.prompt.p50, stats.prompt.p90, stats.prompt.max) == (700, 1100, 1100)
    assert (stats.output.mean, stats.output.p50) == (30, 30)
    assert (stats.duration_s, stats.rate) == (5.0, 0.8)
    assert stats.interarrival_cv == pytest.approx(1.1875**0.5 / 1.25)  # gaps 1, 0, 3, 1
    alone = trace_stats(Trace("one", "", 512, ROWS[:1]))
    assert (alone.rate, alone.interarrival_cv, alone.turns_mean) == (0, 0, 1)


def test_from_a_profile_to_a_figure(tmp_path: Path) -> None:
    made, small = tmp_path / "made.jsonl", tmp_path / "deep/small.jsonl"
    done = run("generate", "doc_qa", "--requests", 40, "--rate", 2, "--seed", 5, "--out", made)
    assert done.exit_code == 0, done.output
    assert run("scale", made, "--divide", 16, "--out", small).exit_code == 0
    numbers, figure = tmp_path / "stats.json", tmp_path / "stats.svg"
    done = run("stats", small, "--json", numbers, "--figure", figure)
    assert done.exit_code == 0, done.output
    trace, _ = read_trace(small)
    assert trace.block_tokens == 32
    written = json.loads(numbers.read_text())
    assert written["requests"] == 40
    assert written["prompt_tokens"] == sum(r.prompt_tokens for r in trace.requests)
    assert f"{written['prompt_tokens']:,}" in done.output
    svg = figure.read_text()
    for text in ("doc_qa: 40 requests", "share of requests", "requests per second", "later turn"):
        assert text in svg
    again = tmp_path / "again.svg"
    run("stats", small, "--figure", again)
    assert again.read_text() == svg
    run("stats", small, "--figure", tmp_path / "stats.png")
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")


def test_bad_rows_are_named_and_the_rest_is_converted(tmp_path: Path) -> None:
    given, out = tmp_path / "given.csv", tmp_path / "out.jsonl"
    given.write_text("num_prefill_tokens,num_decode_tokens\n700,20\n0,3\n9,9\n8\n")
    failed = run("convert", given, "--rate", 1, "--out", out)
    assert isinstance(failed.exception, ConfigError)
    assert "line 3: num_prefill_tokens: expected" in str(failed.exception)
    assert not out.exists()
    command = ["trace", "convert", given, "--rate", "1", "--out", out, "--skip-bad"]
    done = subprocess.run(
        [sys.executable, "-m", "csps", *command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "line 3: num_prefill_tokens" in done.stderr
    assert "line 5: expected 2 columns, got 1" in done.stderr
    assert "left out 2 bad rows, kept 2" in done.stderr
    assert [r.prompt_tokens for r in read_trace(out)[0].requests] == [700, 9]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(path, TRACE)
    for words, text in (
        (("stats", path, "--figure", tmp_path / "x.pdf"), "--figure: expected a name in .png or"),
        (("stats", path, "--figure", tmp_path / "no/x.png"), "--figure: "),
        (("stats", path, "--json", tmp_path / "no/x.json"), "--json: "),
        (("scale", path, "--out", path / "x"), "trace.jsonl"),
    ):
        done = run(*words)
        assert isinstance(done.exception, ConfigError), words
        assert text in str(done.exception)


def test_matplotlib_is_loaded_for_a_figure_alone(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(path, TRACE)
    code = (
        "import sys; from csps.cli import app\n"
        f"app(['trace', 'stats', {str(path)!r}], standalone_mode=False)\n"
        "assert not {'matplotlib', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
