"""The figure of the strategies bench, from a record made by its own code."""

import json
import subprocess
import sys
from pathlib import Path

from csps.bench.strategies_load import Kind
from csps.bench.strategies_score import UNFINISHED, Sample, mark_best, request_rows, summarize

ROOT = Path(__file__).parents[2]


def write_record(path: Path) -> None:
    rows = []
    for slower, (name, strategy) in enumerate(
        [("csps", "csps"), ("tp2-512", "sarathi"), ("tp2-256", "sarathi"), ("shift-512", "shift")]
    ):
        ttfts_s = [0.1 * (1 + slower) * (1 + i) for i in range(20)]
        samples = [
            Sample(kind, 0.0, 0.0, 100, 3, None, ttft_s, ttft_s + 0.1, (30.0, 70.0))
            for kind in Kind
            for ttft_s in ttfts_s
        ]
        if strategy == "shift":  # its documents never had a first token
            samples[20:] = [
                Sample(Kind.DOCUMENT, 0.0, 0.0, 100, 0, UNFINISHED, 9.0, 9.0, ()) for _ in ttfts_s
            ]
        rows.append(
            {"name": name, "strategy": strategy, **summarize(samples),
             "requests": request_rows(samples)}
        )  # fmt: skip
    record = {"bench": "strategies", "results": {"configurations": mark_best(rows)}}
    path.write_text(json.dumps(record))


def plot(path: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts/plot_strategies.py"
    return subprocess.run(
        [sys.executable, script, path, "--out", out, *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_best_of_every_strategy_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "strategies.json"
    write_record(path)
    done = plot(path, tmp_path / "figure", "--png")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "figure.svg").read_text()
    for text in ("chats", "documents", "TTFT (s)", "TBT (ms)", "p99"):
        assert f">{text}</text>" in svg
    assert ">sarathi (tp2-512)</text>" in svg
    assert "tp2-256" not in svg
    assert svg.count(">sarathi</text>") == 3  # each line has its name
    assert svg.count(">shift</text>") == 2  # there is no line of its documents
    assert ">ring</text>" not in svg


def test_the_same_record_gives_the_same_file_and_no_png_unasked(tmp_path: Path) -> None:
    path = tmp_path / "strategies.json"
    write_record(path)
    for name in ("one", "two"):
        assert plot(path, tmp_path / name).returncode == 0
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert not list(tmp_path.glob("*.png"))


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    other = plot(ROOT / "docs/results/recall.json", tmp_path / "x")
    assert other.returncode == 1
    assert "recall.json: is not a JSON of csps bench strategies" in other.stderr
    assert not list(tmp_path.glob("x.*"))
