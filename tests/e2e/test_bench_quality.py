"""`csps bench quality` at a tiny size, and what is left of it when it is ended early."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

TIMEOUT_S = 120.0
TOKENS = 600
MARK = "CSPS_TEST_MARK"
# 3 layers of 3 KV heads of 16 dimensions in float32; the other of two ranks holds half.
DENSE_KV_BYTES_PER_TOKEN = 0.5 * 3 * 3 * 16 * 2 * 4


def command(model: Path, path: Path, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "csps", "bench", "quality", "--model", str(model)),
        *("--tokens", str(TOKENS), "--dtype", "float32", "--json", str(path)),
        *(
            "--serve",
            "--block-size 16 --long-tokens 128 --csa-min-tokens 256 --csa-min-recall-p5 0",
            *flags,
        ),
    ]


def test_ways_to_attend_on_the_same_prompts(tiny: Path, tmp_path: Path) -> None:
    path, text = tmp_path / "quality.json", tmp_path / "story.txt"
    text.write_text("".join(f"Day {day}: the sea was calm, the wind fair.\n" for day in range(900)))
    flags = ["--attention", "csa,dense,csa-distance", "--gamma", "0.5,1", "--window", "4"]
    flags += ["--prompts", "1", "--texts", "1", "--text", str(text), "--csa-min-recall", "0"]
    done = subprocess.run(
        command(tiny, path, *flags),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    assert "min left" in done.stderr
    record = json.loads(path.read_text())
    assert record["bench"] == "quality"
    assert record["parameters"]["text"] == ["story.txt"]
    assert "--csa-min-recall 0.0" in " ".join(record["parameters"]["server"])
    found = record["results"]
    assert found["complete"]
    names = ["dense", "csa 0.5", "csa 1", "csa-distance 4"]
    assert [row["variant"] for row in found["prompts"]] == names * (3 + 1)
    for row in found["prompts"]:
        assert (row["sparse"] is None) == (row["variant"] == "dense")
        assert len(row["received_by_rank"]) == 2
        assert 0 < row["received_bytes_mean"] <= row["received_bytes_max"]
        expected = row["prompt_tokens"] * DENSE_KV_BYTES_PER_TOKEN
        assert row["dense_kv_bytes"] == pytest.approx(expected)
        assert row["ttft_s"] > 0
        if row["task"] == "text":
            assert row["prompt_tokens"] == TOKENS
            assert len(row["token_ids"]) == 64
        else:
            assert TOKENS - 50 < row["prompt_tokens"] <= TOKENS
            assert row["correct"] == (row["answer"] in row["output"])
    summary = {(row["task"], row["variant"]): row for row in found["summary"]}
    assert len(summary) == len(found["summary"]) == 5 * 4
    for task in ("needle", "multikey", "midtext", "ppl", "agreement"):
        assert [summary[task, name]["prompts"] for name in names] == [1] * 4
        exact, sparse = summary[task, "csa 1"], summary[task, "csa 0.5"]
        assert sparse["density"] < exact["density"] == 1.0
        assert summary[task, "csa-distance 4"]["recall_mean"] < 1.0
    # Keeping everything is dense; keeping less is not.
    assert summary["ppl", "dense"]["ppl_over_dense"] == 1.0
    assert summary["ppl", "csa 1"]["ppl_over_dense"] == pytest.approx(1.0, abs=1e-4)
    assert abs(summary["ppl", "csa-distance 4"]["ppl_over_dense"] - 1) > 1e-3
    for name in ("dense", "csa 1"):
        assert summary["agreement", name]["equal"] == 1.0
        assert summary["agreement", name]["common_prefix"] == 64
    # Dense attention on a split prompt moves the other ranks' KV and little else.
    assert 1.0 <= summary["needle", "dense"]["received_over_dense_kv_mean"] < 1.1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_measured_is_kept(tiny: Path, tmp_path: Path, number: int) -> None:
    path, mark = tmp_path / "quality.json", uuid.uuid4().hex
    flags = ["--tasks", "needle", "--prompts", "10000", "--attention", "csa", "--ranks", "1"]
    with subprocess.Popen(
        command(tiny, path, *flags),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {MARK: mark},
    ) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        saved = len(json.loads(path.read_text())["results"]["prompts"])
        process.send_signal(number)
        _, log = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + number, log
    assert "Traceback" not in log, log
    results = json.loads(path.read_text())["results"]
    assert not results["complete"]
    assert len(results["prompts"]) >= saved > 0
    # Nothing to receive, nothing to compare it with.
    assert results["summary"][0]["received_bytes_max"] == 0
    assert results["summary"][0]["received_over_dense_kv_mean"] is None
    family = [
        found
        for found in psutil.process_iter(["environ"])
        if (found.info["environ"] or {}).get(MARK) == mark
    ]
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_prompt_too_long_for_the_model(tiny: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(
            tiny, tmp_path / "x.json", "--tokens", "600,2045", "--tasks", "needle", "--ranks", "1"
        ),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 1
    assert "--tokens: 2045 and 12 of output exceed the model's 2048 tokens" in done.stderr
    assert "Traceback" not in done.stderr
