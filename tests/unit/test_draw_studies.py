"""The figures of the simulated studies, drawn from the results on record."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def draw(study: str, results: Path, out: Path) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "scripts/draw_studies.py", study, results, "--out", out]
    return subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("study", ["paper", "shift"])
def test_what_is_simulated_is_called_so(study: str, tmp_path: Path) -> None:
    done = draw(study, RESULTS / f"sim_{study}.json", tmp_path / "figure")
    assert done.returncode == 0, done.stderr
    assert "Simulated" in (tmp_path / "figure.svg").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_other_results_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"studies": []}))
    done = draw("paper", other, tmp_path / "figure")
    assert done.returncode == 1
    assert "is not a JSON of a simulated study" in done.stderr
