"""`csps simulate` from flags to files."""

import json
from pathlib import Path

import pytest

from csps.cli import app
from csps.core.errors import ConfigError
from csps.trace.schema import write_trace
from tests.unit.simulating import request, trace

FLAGS = ("--cluster", "a100x8", "--model", "smollm2-135m", "--layout", "sp")


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    write_trace(path, trace([request(0.2 * i, 64, 4, 1000 * i) for i in range(6)]))
    return str(path)


def simulate(*arguments: str) -> None:
    app(["simulate", *arguments], standalone_mode=False)


def test_writes_a_run_and_says_that_it_is_simulated(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, record = tmp_path / "out", tmp_path / "summary.json"
    simulate(small, *FLAGS, "--out", str(out), "--json", str(record))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["kind"] == "simulated"
    assert json.loads(record.read_text()) == summary
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines
    assert all("simulated" in line for line in lines)
    with pytest.raises(ConfigError, match="holds a run already"):
        simulate(small, *FLAGS, "--out", str(out))


def test_answers_of_one_token_have_no_gaps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out, report = tmp_path / "trace.jsonl", tmp_path / "out", tmp_path / "report"
    write_trace(path, trace([request(0.2 * i, 64, 1, 1000 * i) for i in range(4)]))
    simulate(str(path), *FLAGS, "--out", str(out))
    said = capsys.readouterr().err
    assert "ttft_s mean" in said
    assert "tbt_ms" not in said
    app(["compare", str(out), "--out", str(report)], standalone_mode=False)
    assert (report / "report.html").exists()


def test_finds_the_capacity(small: str, tmp_path: Path) -> None:
    """Six prompts that queue one behind the other: the first token's time sets the rate."""
    record = tmp_path / "summary.json"
    flags = (*FLAGS, "--strategy", "sarathi", "--replicas", "8", "--max-running", "1")
    simulate(
        small, *flags, "--find-capacity", "--slo-ttft", "0.01", "--tolerance", "0.2",
        "--json", str(record),
    )  # fmt: skip
    summary = json.loads(record.read_text())
    tried = {row["requests_per_s"]: row["met"] for row in summary["capacity"]["tried"]}
    assert tried[summary["capacity"]["requests_per_s"]]
    assert not all(tried.values())
    with pytest.raises(ConfigError, match="give what must be met"):
        simulate(small, *flags, "--find-capacity")


def test_bad_rows_are_named_and_left_out(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path(small).open("a") as file:
        file.write('{"arrival_s": 1.0, "prompt_to')
    with pytest.raises(ConfigError, match="line 8"):
        simulate(small, *FLAGS)
    simulate(small, *FLAGS, "--skip-bad", "--out", str(tmp_path / "out"))
    assert "line 8" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["skipped_rows"] == 1
