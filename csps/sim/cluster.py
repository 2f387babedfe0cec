"""Cluster files: what machines can do, each figure with its source.

Two kinds. An *analytic* file has the figures that csps.sim.cost computes steps from. A
*calibrated* one has models fitted to the steps of live servers (csps.sim.calibrate).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from csps.core.errors import ConfigError
from csps.core.plan import Lane, Layout
from csps.core.strategy import Strategy
from csps.sched.cost import CostModel
from csps.sim.files import Table, read_table

# Share of its speed that a step can lose beside another: it never stands still.
MOST_LOST = 0.95

Member = TypeVar("Member", Strategy, Lane, Layout)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: peaks by the data sheet. `fp8_flops` 0: it has no fp8 arithmetic."""

    bf16_flops: float  # per second
    fp8_flops: float
    memory_bytes: float
    hbm_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Links:
    """Bytes/s in one direction. Latencies: of one message, and of one collective of a group."""

    nvlink_bytes_per_s: float  # of a GPU
    network_bytes_per_s: float  # of a node
    nvlink_message_s: float
    nvlink_collective_s: float
    network_message_s: float
    network_collective_s: float


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the peaks that are reached; `memory`: share of it that serving may use."""

    linear: float
    attention: float
    hbm: float
    nvlink: float
    network: float
    memory: float


@dataclass(frozen=True, slots=True)
class AnalyticCluster:
    """`step_s`: between the end of a lane's step and the begin of its next one's work."""

    name: str
    num_gpus: int
    gpus_per_node: int
    gpu: Gpu
    links: Links
    efficiency: Efficiency
    step_s: float


class Beside(NamedTuple):
    """Beside another lane's step of at least `tokens` tokens, a step loses `lost` of its speed."""

    tokens: int
    lost: float


@dataclass(frozen=True, slots=True)
class FittedLane:
    """One lane of one server: its steps alone, by layout, and `beside` a step of another lane.

    `beside` by ascending tokens, empty where no step ever is; besides, a step that is there all the
    time takes `delay_s` longer, whatever its size. `spread_s`: what a decode step in layout SP
    takes besides if KV of some token is on several ranks. `step_s` as in AnalyticCluster.
    """

    models: Mapping[Layout, CostModel]
    beside: tuple[Beside, ...]
    delay_s: float
    spread_s: float
    step_s: float


@dataclass(frozen=True, slots=True)
class FittedServer:
    """What was fitted to one strategy's runs, on `sp` * `tp` ranks with these flags."""

    sp: int
    tp: int
    block_size: int
    pages_per_rank: int
    stage_tokens: int
    lanes: Mapping[Lane, FittedLane]


@dataclass(frozen=True, slots=True)
class CalibratedCluster:
    """Servers of one model on one machine."""

    name: str
    model: str
    servers: Mapping[Strategy, FittedServer]

    def server(self, strategy: Strategy) -> FittedServer:
        """ConfigError if the strategy was not measured."""
        if strategy not in self.servers:
            known = ", ".join(self.servers)
            raise ConfigError(f"--strategy: {self.name} was calibrated for {known}, not {strategy}")
        return self.servers[strategy]


Cluster = AnalyticCluster | CalibratedCluster


def load_cluster(name: str | Path) -> Cluster:
    """A shipped cluster by name, or a file. ConfigError names what is wrong."""
    table = read_table("--cluster", "clusters", str(name))
    kind = table.text("kind")
    if kind == "analytic":
        return _analytic(table)
    if kind == "calibrated":
        return _calibrated(table)
    raise table.error("kind", f"expected analytic or calibrated, got {kind!r}")


def _analytic(table: Table) -> AnalyticCluster:
    gpu, links, efficiency = (_sourced(table, name) for name in ("gpu", "links", "efficiency"))
    overhead = _sourced(table, "overhead")
    tiny = 1e-12
    return AnalyticCluster(
        name=table.text("name"),
        num_gpus=table.integer("num_gpus", 1),
        gpus_per_node=table.integer("gpus_per_node", 1),
        gpu=Gpu(
            gpu.number("bf16_flops", 1),
            gpu.number("fp8_flops"),
            gpu.number("memory_bytes", 1),
            gpu.number("hbm_bytes_per_s", 1),
        ),
        links=Links(
            links.number("nvlink_bytes_per_s", 1),
            links.number("network_bytes_per_s", 1),
            links.number("nvlink_message_s"),
            links.number("nvlink_collective_s"),
            links.number("network_message_s"),
            links.number("network_collective_s"),
        ),
        efficiency=Efficiency(
            **{
                name: efficiency.number(name, tiny, 1.0)
                for name in ("linear", "attention", "hbm", "nvlink", "network", "memory")
            }
        ),
        step_s=overhead.number("step_s"),
    )


def _sourced(table: Table, key: str) -> Table:
    """A table of figures, every one of which has a line of the same name in `key`.source."""
    figures = table.table(key)
    sources = figures.table("source")
    for name in figures.values:
        if name != "source":
            sources.text(name)
    return figures


def _calibrated(table: Table) -> CalibratedCluster:
    table.text("source")
    servers = {}
    for server in table.tables("server"):
        strategy = _member(server, "strategy", Strategy)
        lanes = {}
        for lane in server.tables("lane"):
            models = {
                _member(model, "layout", Layout): CostModel(
                    *(model.number(name) for name in CostModel._fields)
                )
                for model in lane.tables("model")
            }
            lanes[_member(lane, "lane", Lane)] = FittedLane(
                models=models,
                beside=_beside(lane),
                delay_s=lane.number("delay_s"),
                spread_s=lane.number("spread_s"),
                step_s=lane.number("step_s"),
            )
        servers[strategy] = FittedServer(
            sp=server.integer("sp", 1),
            tp=server.integer("tp", 1),
            block_size=server.integer("block_size", 1),
            pages_per_rank=server.integer("pages_per_rank", 1),
            stage_tokens=server.integer("stage_tokens", 1),
            lanes=lanes,
        )
    return CalibratedCluster(table.text("name"), table.text("model"), servers)


def _beside(lane: Table) -> tuple[Beside, ...]:
    if "beside" not in lane.values:
        return ()
    tables = lane.tables("beside")
    found = [
        Beside(each.integer("tokens", 1), each.number("lost", 0.0, MOST_LOST)) for each in tables
    ]
    if [item.tokens for item in found] != sorted({item.tokens for item in found}):
        raise lane.error("beside", "tokens must ascend")
    return tuple(found)


def _member(table: Table, key: str, kind: type[Member]) -> Member:
    try:
        return kind(table.text(key))
    except ValueError:
        raise table.error(key, f"expected one of {', '.join(kind)}") from None
