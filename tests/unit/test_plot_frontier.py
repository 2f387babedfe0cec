"""The frontier's figure, from the records that are committed."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"
ROWS, MEANS = RESULTS / "frontier_rows.json", RESULTS / "frontier_means.json"


def plot(*paths: Path, out: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts/plot_frontier.py"
    return subprocess.run(
        [sys.executable, script, *paths, "--out", out],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_way_to_choose_and_every_cost_is_drawn(tmp_path: Path) -> None:
    done = plot(ROWS, MEANS, out=tmp_path / "frontier")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "frontier.svg").read_text()
    for text in ("csa, sampled rows", "csa, mean keys", "csa-distance", "density", "TTFT", "bytes"):
        assert text in svg
    # One label a point: seven gammas, six gammas and four windows, in three panels.
    assert svg.count(">0.95</text>") == 2 * 3
    assert svg.count(">16</text>") == 3


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    other = plot(RESULTS / "recall.json", out=tmp_path / "x")
    assert other.returncode == 1
    assert "recall.json: is not a JSON of csps bench quality" in other.stderr
    again = tmp_path / "again.json"
    shutil.copy(ROWS, again)
    twice = plot(ROWS, again, out=tmp_path / "x")
    assert "stands in an earlier file too" in twice.stderr
    assert not list(tmp_path.glob("x.*"))
