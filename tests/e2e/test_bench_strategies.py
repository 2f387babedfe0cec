"""`csps bench strategies` and `csps bench layouts` at a tiny size. No timing."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest

TIMEOUT_S = 300.0
MARK = "CSPS_TEST_MARK"
LOAD = [
    *("--duration", "1", "--chat-rate", "5", "--chat-tokens", "20-60", "--chat-output", "6"),
    *("--doc-every", "0.5", "--doc-tokens", "300,600", "--doc-output", "3"),
]
SARATHI = "--strategy sarathi --workers 1 --threads-per-rank 1 --token-budget"


def command(bench: str, model: Path, path: Path, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "csps", "bench", bench, "--model", str(model)),
        *("--dtype", "float32", "--json", str(path)),
        *("--serve", "--block-size 16 --long-tokens 128 --kv-memory 64MiB", *flags),
    ]


def run(bench: str, model: Path, path: Path, *flags: str) -> tuple[int, str]:
    """Status and stderr. A bench that takes too long is ended, and its servers with it."""
    with subprocess.Popen(
        command(bench, model, path, *flags),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _, log = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    return process.returncode, log


def test_the_same_requests_to_every_configuration(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "strategies.json"
    flags = ["--drain", "100", "--config", "ours=--workers 2"]
    flags += ["--config", f"theirs 64={SARATHI} 64", "--config", f"theirs 512={SARATHI} 512"]
    status, log = run("strategies", tiny, path, *LOAD, *flags)
    assert status == 0, log
    assert "[2/3] theirs 64: starting" in log
    record = json.loads(path.read_text())
    assert record["parameters"]["text"] == "Python standard library"
    assert record["results"]["complete"]
    found = record["results"]["configurations"]
    assert [row["strategy"] for row in found] == ["csps", "sarathi", "sarathi"]
    assert found[0]["best"]
    assert found[1]["best"] != found[2]["best"]
    planned = [
        [(r["kind"], r["at_s"], r["prompt_tokens"]) for r in row["requests"]] for row in found
    ]
    assert planned[0] == planned[1] == planned[2]
    assert [n for kind, _, n in planned[0] if kind == "document"] == [300, 600]
    for row in found:
        assert row["figures"]["all"]["count"] == len(row["requests"])
        assert row["figures"]["all"]["failed"] == 0
        for request in row["requests"]:
            tokens = 6 if request["kind"] == "chat" else 3
            assert request["output_tokens"] == len(request["gaps_ms"]) + 1 == tokens
            assert request["sent_s"] >= request["at_s"]
            total = request["ttft_s"] + sum(request["gaps_ms"]) / 1e3
            assert request["response_s"] == pytest.approx(total)


def test_what_was_measured_is_kept_and_what_waits_counts(tiny: Path, tmp_path: Path) -> None:
    path, mark = tmp_path / "strategies.json", uuid.uuid4().hex
    configurations = [part for i in range(9) for part in ("--config", f"{i}={SARATHI} 64")]
    words = command("strategies", tiny, path, *LOAD, "--drain", "0", *configurations)
    with subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {MARK: mark},
    ) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM, log
    assert "Traceback" not in log, log
    results: dict[str, Any] = json.loads(path.read_text())["results"]
    assert not results["complete"]
    row = results["configurations"][0]
    last = row["requests"][-1]  # sent when the drain was over
    assert last["error"] == "had not ended when the drain was over"
    assert last["response_s"] > 0
    assert row["figures"]["all"]["failed"] >= 1
    family = [
        found
        for found in psutil.process_iter(["environ"])
        if (found.info["environ"] or {}).get(MARK) == mark
    ]
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_document_too_long_for_the_model(tiny: Path, tmp_path: Path) -> None:
    flags = ["--doc-tokens", "600,2046", "--doc-output", "3", "--config", f"a={SARATHI} 64"]
    status, log = run("strategies", tiny, tmp_path / "x.json", "--duration", "1", *flags)
    assert status == 1, log
    assert "2049 tokens with the output, the model has room for 2048" in log
    assert "Traceback" not in log


def test_layouts_in_turn(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "layouts.json"
    flags = ["--sizes", "1,3", "--context", "20", "--output", "6", "--rounds", "2"]
    status, log = run("layouts", tiny, path, *flags)
    assert status == 0, log
    results = json.loads(path.read_text())["results"]
    assert results["complete"]
    assert [row["size"] for row in results["sizes"]] == [1, 3]
    for row in results["sizes"]:
        assert row["step_ms_p50"]["sp"] > 0 < row["step_ms_p50"]["tp"]
        assert row["sp_over_tp"]["low"] <= row["sp_over_tp"]["p50"] <= row["sp_over_tp"]["high"]
        assert row["over_better"] >= 1.0
        assert sum(row["chosen"].values()) > row["pairs"] > 0
    assert len(results["runs"]) == 2 * 2
    steps = results["steps"]
    # All tokens of all runs, and no warm-up: prompts, and outputs but each one's last.
    assert sum(step["shape"][0] for step in steps) == 2 * (1 + 3) * (20 + 5)
    nums = [sum(step["layout"] == layout for step in steps) for layout in ("sp", "tp")]
    assert abs(nums[0] - nums[1]) <= len(steps) / 4
    assert sum(row["steps"] for row in results["errors"] if row["steps of"] == "all") == len(steps)
