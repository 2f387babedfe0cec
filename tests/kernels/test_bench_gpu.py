"""make bench-gpu at tiny sizes in Triton's interpreter: that it runs, records, and sees errors."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scripts.bench_gpu import parity, report
from scripts.bench_gpu.bench import Bench, Floors, NotHereError
from scripts.bench_gpu.sizes import QUICK
from scripts.bench_gpu.timing import Timing


def bench(tmp_path: Path, seconds: float = 60.0) -> Bench:
    return Bench(
        device=torch.device("cpu"),
        dtype=torch.float32,
        sizes=QUICK,
        floors=Floors(flops_per_s=100.0, bytes_per_s=10.0),
        model="",
        deadline=time.perf_counter() + seconds,
        save=lambda rows: (tmp_path / "rows.json").write_text(json.dumps(rows)),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs in earnest")
def test_a_section(tmp_path: Path) -> None:
    """In processes of its own: machine always runs, and its rates are the other's floors."""
    command = [sys.executable, "-m", "scripts.bench_gpu", "--device", "cpu", "--quick"]
    command += ["--only", "decode", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    record = json.loads((tmp_path / "quick.json").read_text())
    assert list(record["sections"]) == ["machine", "decode"]
    rows = {row["case"]: row for row in record["sections"]["decode"]["rows"]}
    (rate,) = [
        row["bytes"] / row["median_s"]
        for row in record["sections"]["machine"]["rows"]
        if row["case"] == "copy"
    ]
    row = rows["triton: 3 x 80"]
    kv_bytes = 3 * 80 * 2 * 2 * 16 * 4
    assert kv_bytes < row["bytes"] < 1.1 * kv_bytes
    assert row["floor_s"] >= row["bytes"] / rate
    assert row["of_floor"] == pytest.approx(row["floor_s"] / row["median_s"])


def test_kernels_compile_without_a_gpu() -> None:
    """For Hopper: attention's products are those of its matrix units."""
    command = [sys.executable, "-m", "scripts.compile_kernels", "--only", "block_sparse: model"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, env=environment, check=True, timeout=200, stdout=subprocess.PIPE, text=True
    )
    counts = re.findall(r"_block_sparse .* (\d+) wgmma", done.stdout)
    assert counts, done.stdout
    assert all(int(count) for count in counts)


def test_cases(tmp_path: Path) -> None:
    """One that raises, one that cannot be had here, and one after the deadline."""
    one = bench(tmp_path)

    def fail() -> dict:
        raise ValueError("wrong")

    def skip() -> dict:
        raise NotHereError("no such thing")

    assert one.case("fails", fail) is None
    assert one.case("skipped", skip) is None
    assert one.case("works", lambda: {"x": 1}) == {"x": 1}
    one.deadline = time.perf_counter()
    one.case("late", fail)
    failed, skipped, works, late = json.loads((tmp_path / "rows.json").read_text())
    assert failed["error"] == "ValueError: wrong"
    assert "in fail" in failed["traceback"]
    assert skipped["skipped"] == "no such thing"
    assert works == {"case": "works", "x": 1}
    assert "error" not in late


def test_floors(tmp_path: Path) -> None:
    timing = Timing(4.0, 3.0, 5.0, 7, 9.0, 0.1)
    row = bench(tmp_path).beside_floor(timing, flops=200.0, num_bytes=10.0)
    assert (row["floor_s"], row["bound"], row["of_floor"]) == (2.0, "matrix", 0.5)
    row = bench(tmp_path).beside_floor(timing, flops=0.0, num_bytes=30.0)
    assert (row["floor_s"], row["bound"], row["of_floor"]) == (3.0, "memory", 0.75)


@pytest.mark.parametrize(
    ("got", "error"), [([1.0, 2.0], 0.0), ([1.0, 4.0], 4 / 5), ([1.0, torch.nan], torch.inf)]
)
def test_parity_sees_errors(got: list[float], error: float) -> None:
    expected = torch.tensor([1.0, 2.0])
    found = parity.relative_error(torch.tensor(got), expected)
    assert found == pytest.approx(error**0.5 if error < 1 else error, abs=1e-6)


def test_targets() -> None:
    """What was not measured is neither met nor missed; an error in one case voids the parity."""
    dense = {"case": "density 0.1: attention", "over_dense": 0.2}
    sections = {
        "prefill": {"rows": [dense]},
        "parity": {"rows": [{"case": "a", "relative_error": 1e-3}, {"case": "b", "error": "x"}]},
    }
    met = {target["claim"][:20]: target["met"] for target in report.targets(sections)}
    assert met["block-sparse prefill"] is None  # the later one of two, at density 1
    assert report.targets(sections)[1]["met"] is False
    assert met["largest relative err"] is None
