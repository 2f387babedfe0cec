"""Runs made by hand, for tests of records."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from csps.core.plan import Lane, Layout
from csps.records.rows import REQUESTS_FILE, STEPS_FILE, RequestRow, Status, StepRow, write_rows
from csps.records.run import RunInfo, RunKind, write_run

RUN = RunInfo(
    name="two",
    kind=RunKind.LIVE,
    strategy="csps",
    model="tiny",
    ranks=2,
    trace="made",
    num_requests=0,
    elapsed_s=10.0,
    block_size=16,
    pages_per_rank=100,
)


def request(request_id: str = "r0", **changes: Any) -> RequestRow:
    """100 prompt tokens, first of 3 tokens after 1 s, gaps of 100 and 300 ms."""
    row = RequestRow(
        request_id=request_id,
        arrival_s=0.0,
        sent_s=0.0,
        prompt_tokens=100,
        wanted_tokens=3,
        output_tokens=3,
        status=Status.DONE,
        response_s=1.4,
        queue_s=0.5,
        ttft_s=1.0,
        gaps_ms=(100.0, 300.0),
    )
    return replace(row, **changes)


def step(step_id: int = 0, **changes: Any) -> StepRow:
    """A prefill step of 100 tokens on two ranks, from 0 s to 1 s; half the bytes of exact."""
    row = StepRow(
        lane=Lane.PREFILL,
        step_id=step_id,
        started_s=0.0,
        ended_s=1.0,
        layout=Layout.SP,
        num_tokens=100,
        num_sequences=1,
        num_pairs=5050,
        num_keys=0,
        wall_s=(0.9, 1.0),
        compute_s=(0.8, 0.7),
        comm_s=(0.3, 0.4),
        exposed_comm_s=(0.1, 0.3),
        bytes_sent={"kv": 400, "outputs": 100},
        dense_bytes=1000,
        predicted_s={Layout.SP: 1.1, Layout.TP: 2.0},
        density=0.4,
        recall=0.98,
        kv_pages=(4, 3),
    )
    return replace(row, **changes)


def write_folder(
    folder: Path, run: RunInfo, requests: Sequence[RequestRow], steps: Sequence[StepRow] = ()
) -> Path:
    folder.mkdir(parents=True)
    write_run(folder, replace(run, num_requests=len(requests)))
    write_rows(folder / REQUESTS_FILE, requests)
    if steps:
        write_rows(folder / STEPS_FILE, steps)
    return folder
