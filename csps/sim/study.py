"""Many simulations that are compared with each other, each kept on disk once it is done."""

import hashlib
import json
from pathlib import Path
from typing import Any

from csps.core.errors import ConfigError
from csps.records.summary import save
from csps.sim.cluster import Cluster
from csps.sim.config import SimConfig
from csps.sim.model import SimModel
from csps.sim.run import simulate
from csps.trace.schema import Trace

_DIGITS = 5  # significant ones of a figure


class Cases:
    """Figures of simulations, in one file of `folder` each.

    Files are found again by trace, cluster, model and flags, but not by the code: remove the
    folder when the simulator has changed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def figures(
        self, trace: Trace, cluster: Cluster, model: SimModel, config: SimConfig
    ) -> dict[str, Any]:
        """`digest` of a run. ConfigError as csps.sim.run.simulate."""
        named = repr((trace, cluster, model, config)).encode()
        path = self._folder / f"{hashlib.sha256(named).hexdigest()[:24]}.json"
        if path.exists():
            try:
                kept: dict[str, Any] = json.loads(path.read_text("utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path}: {error}: remove it") from None
            return kept
        figures = digest(simulate(trace, cluster, model, config).summary())
        save(path, figures)
        return figures


def digest(summary: dict[str, Any]) -> dict[str, Any]:
    """The figures of summary.json that studies compare, with 5 significant digits.

    Names and units are summary.json's.
    """
    latency, throughput = summary["latency"], summary["throughput"]
    times = {
        name: {part: _rounded(latency[name][part]) for part in ("mean", "p50", "p99")}
        for name in ("ttft_s", "tbt_ms", "response_s", "queue_s")
    }
    return {
        "requests": summary["requests"]["count"],
        "done": summary["requests"]["done"],
        "rate": _rounded(summary["request_rate"]),
        **times,
        **{name: _rounded(value) for name, value in throughput.items()},
        "hit_share": _rounded(summary["cache"]["hit_share"]),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
