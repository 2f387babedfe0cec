"""Flags of `csps serve` about the ranks' devices; their defaults stand with `serve`."""

from typing import Annotated

import typer

from csps.core.config import AttentionBackend

_PANEL = "Model and ranks"

Backend = Annotated[
    AttentionBackend,
    typer.Option(
        help="Kernels that attend. torch: the device's fused attention. triton: CSPS's own, on "
        "GPUs. flashinfer: its dense prefill and decode, the rest triton's. auto: on a GPU the "
        "fastest of each phase, timed at start; torch on a CPU.",
        rich_help_panel=_PANEL,
    ),
]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        help="Decode steps on GPUs as CUDA graphs, captured at start; not where decode's kernels "
        "are torch's.",
        rich_help_panel=_PANEL,
    ),
]
WarmUp = Annotated[
    bool | None,
    typer.Option(
        "--warm-up/--no-warm-up",
        help="Run prompt steps of the largest size before the first request, which else waits for "
        "what is loaded at first use; on GPUs unless said otherwise.",
        show_default="on GPUs",
        rich_help_panel=_PANEL,
    ),
]
GpuMemoryUtilization = Annotated[
    float,
    typer.Option(
        help="Share of a GPU's memory for its ranks: weights, workspace, and KV in what is left "
        "(--kv-memory auto).",
        rich_help_panel=_PANEL,
    ),
]
