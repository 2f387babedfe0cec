"""Every `csps bench` at a tiny size: what it writes must be there and add up. No timing."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from csps.bench.server import ServerProcess
from csps.core.errors import UnavailableError

TIMEOUT_S = 300
SPANNING = 600  # tokens; prompts from --long-tokens 512 on are split over the ranks


def bench(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run `csps bench` and read its JSON."""
    path = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "csps", "bench", *arguments, "--json", str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(path.read_text())
    assert record["bench"] == arguments[0]
    assert record["command"].startswith(f"csps bench {arguments[0]} ")
    assert record["machine"]["cpu"]
    assert record["commit"]
    return record


def test_prefill(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm that day, and the ship made way. " * 60)
    flags = ["--tokens", f"{SPANNING},100", "--repeat", "2", "--text", str(text)]
    flags += ["--attention", "dense,csa", "--serve", "--csa-min-tokens 128 --csa-wire int8"]
    record = bench(tmp_path, "prefill", *flags)
    assert record["parameters"]["repeat"] == 2
    spanning, sparse, whole, whole_too = record["results"]
    assert [spanning["tokens"], whole["tokens"]] == [SPANNING, 100]
    for result in (spanning, sparse, whole, whole_too):
        assert result["prefill_tok_s"] == pytest.approx(result["tokens"] / result["ttft_s"])
        assert len(result["runs"]) == 2
        for run in result["runs"]:
            assert run["tokens"] == result["tokens"]
            assert 0 < run["ttft_s"] <= run["client_ttft_s"]
            assert run["compute_s"] > 0
            assert run["peak_memory_mb"] > 100
            assert (run["sparse"] is not None) == (result is sparse)
            assert 0 <= run["exposed_comm_s"] <= run["comm_s"]
            assert run["bytes_moved"] == sum(run["bytes_by_kind"].values())
    assert spanning["runs"][0]["bytes_moved"] == spanning["runs"][1]["bytes_moved"] > 0
    assert whole["runs"][0]["bytes_moved"] == 0  # a short prompt stays on one rank


def test_every_strategy_moves_the_bytes_of_its_formula(tiny: Path, tmp_path: Path) -> None:
    flags = ["--model", str(tiny), "--tokens", str(SPANNING), "--output", "3"]
    rows = bench(tmp_path, "traffic", *flags)["results"]
    assert {row["phase"] for row in rows} == {"prefill", "decode"}
    assert [row["ratio"] for row in rows] == [1.0] * 12


def test_a_known_document_is_not_computed_again(tiny: Path, tmp_path: Path) -> None:
    flags = ["--model", str(tiny), "--tokens", "640", "--question", "30", "--documents", "1"]
    rows = bench(tmp_path, "prefix", *flags, "--strategies", "csps,sarathi")["results"]
    assert [row["strategy"] for row in rows] == ["csps", "sarathi"]
    assert all(row["cached_tokens"] == 640 for row in rows)
    assert all(row["warm_ttft_s"] > 0 for row in rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_decode_moves_the_bytes_of_the_formula(tmp_path: Path, dtype: str) -> None:
    flags = ["--context", str(SPANNING), "--output", "8", "--batch", "2", "--dtype", dtype]
    (result,) = bench(tmp_path, "decode", *flags)["results"]
    assert result["tokens"] == 2 * 7  # the first token of each stream is prefill's
    assert result["bytes_per_token"] == result["bytes_formula"] > 0
    assert result["bytes_ratio"] == 1.0
    assert set(result["bytes_by_kind"]) == {"query", "partial", "drawn"}
    assert 0 < result["tbt_ms_p50"] <= result["tbt_ms_p99"]


def test_planning_ahead_beside_planning_in_turn(tiny: Path, tmp_path: Path) -> None:
    flags = ["--model", str(tiny), "--batch", "2", "--context", "32", "--output", "20"]
    flags += ["--repeats", "1", "--strategies", "sarathi"]
    (row,) = bench(tmp_path, "scheduling", *flags)["results"]
    assert row["strategy"] == "sarathi"
    assert row["async/sync"] == pytest.approx(row["async_tbt_ms"] / row["sync_tbt_ms"])
    assert row["async_tbt_ms"] > 0


def test_interference(tmp_path: Path) -> None:
    flags = ["--tokens", "1000", "--context", "50", "--quiet-tokens", "10", "--output", "400"]
    (result,) = bench(tmp_path, "interference", *flags)["results"]
    assert result["prompt_tokens"] == 1000
    for when in ("quiet", "busy"):
        gaps = result[f"{when}_gaps_ms"]
        assert result[when]["tokens"] == len(gaps) > 0
        assert result[when]["tbt_ms_p50"] <= result[when]["tbt_ms_p99"] <= max(gaps)
    # The gaps cover the whole prefill, however few they are.
    assert sum(result["busy_gaps_ms"]) >= 1e3 * result["ttft_s"] * 0.99


def test_a_stream_too_short_to_be_disturbed_is_an_error(tmp_path: Path) -> None:
    flags = ["--tokens", "1000", "--context", "50", "--quiet-tokens", "200", "--output", "20"]
    done = subprocess.run(
        [sys.executable, "-m", "csps", "bench", "interference", "--ranks", "1", *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 1
    assert "--output: the stream ended after 20 tokens" in done.stderr
    assert "Traceback" not in done.stderr


def test_peers_draw_the_same_tokens(tmp_path: Path) -> None:
    flags = ["--tokens", "64", "--output", "4", "--repeat", "1", "--ranks", "1"]
    flags += ["--dtype", "float32", "--peer-dtypes", "float32"]
    results = bench(tmp_path, "peers", *flags)["results"]
    (ours,), (theirs,) = results["samples"]["csps"], results["samples"]["transformers float32"]
    assert ours["token_ids"] == theirs["token_ids"]
    assert len(ours["tbt_ms"]) == len(theirs["tbt_ms"]) == 3
    medians = results["medians"]
    assert medians["best peer"] == medians["transformers float32"]
    ratio = medians["best peer"]["ttft_s"] / medians["csps"]["ttft_s"]
    assert results["peer_over_csps"]["best peer"]["ttft_s"] == pytest.approx(ratio)


def test_a_terminated_bench_takes_its_server_along() -> None:
    command = [sys.executable, "-m", "csps", "bench", "prefill", "--ranks", "1"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        family: list[psutil.Process] = []
        deadline = time.monotonic() + 120
        while len(family) < 2 and time.monotonic() < deadline:  # the server and its rank
            family = psutil.Process(process.pid).children(recursive=True)
            time.sleep(0.1)
        assert len(family) == 2
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"Traceback" not in log
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_a_server_that_cannot_start_shows_its_log() -> None:
    with (
        pytest.raises(UnavailableError, match=r"(?s)ended with status 1:.*no such directory"),
        ServerProcess("--model", "/nonexistent"),
    ):
        pass


def test_recall_is_checked_against_every_row(tiny: Path, tmp_path: Path) -> None:
    flags = ["--model", str(tiny), "--dtype", "float32", "--block-size", "16", "--threads", "1"]
    flags += ["--gamma", "0.5", "--min-recall", "0", "--min-recall-p5", "0"]
    record = bench(tmp_path, "recall", *flags, *("--tokens", "600", "--prompts", "2"))
    found = record["results"]
    assert len(found["prompts"]) == found["summary"]["prompts"] == 2
    for prompt in found["prompts"]:
        assert prompt["heads"]
        for head in prompt["heads"]:
            assert head["low"] <= head["reported"] <= head["high"]
            assert 0.4 < head["exact"] <= 1.00001
            if head["gamma"] == 1.0:
                assert head["exact"] == pytest.approx(1.0, abs=1e-5)
    assert 0 <= found["summary"]["below"] <= 1 - found["summary"]["inside"] + 1e-9
