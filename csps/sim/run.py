"""Simulates a trace: requests in, the rows of a run out."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from csps.core.attention import DENSE, AttentionParams
from csps.core.config import ServerConfig
from csps.core.errors import ConfigError, CspsError
from csps.core.plan import Lane, Layout
from csps.records.rows import (
    REQUESTS_FILE,
    STEPS_FILE,
    SUMMARY_FILE,
    RequestRow,
    Status,
    StepRow,
    write_rows,
)
from csps.records.run import RunInfo, RunKind, write_run
from csps.records.summary import save, summarize
from csps.sched.cost import CostModel
from csps.sched.layout import CheapestLayout, LayoutPolicy
from csps.sched.pacing import DecodePace
from csps.sched.schedulers import given_layout, make_scheduler
from csps.sim.clock import Clock
from csps.sim.cluster import CalibratedCluster, Cluster
from csps.sim.config import UNLIMITED, SimConfig, kv_pages, server_config
from csps.sim.cost import FittedCosts, analytic_costs, layout_models
from csps.sim.density import density_table
from csps.sim.holdings import Holdings
from csps.sim.model import SimModel
from csps.sim.replica import OUTPUT_TOKEN, Replica
from csps.sim.request import SimRequest, make_request
from csps.sim.router import Router
from csps.sim.sharing import FluidSharing, MeasuredSharing, Sharing
from csps.sim.step_cost import StepCosts
from csps.trace.schema import Trace, TraceRequest

# Told how many requests ended, of how many, and the virtual time.
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, slots=True)
class SimResult:
    """A simulated run. Rows in the order of ending."""

    run: RunInfo
    requests: list[RequestRow]
    steps: list[StepRow]

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the run's folder; its summary. ConfigError if that fails."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_run(folder, self.run)
            write_rows(folder / REQUESTS_FILE, self.requests)
            write_rows(folder / STEPS_FILE, self.steps)
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror}") from None
        summary = self.summary()
        save(folder / SUMMARY_FILE, summary)
        return summary

    def summary(self) -> dict[str, Any]:
        """What summary.json says."""
        return summarize(self.run, self.requests, self.steps)


def simulate(
    trace: Trace,
    cluster: Cluster,
    model: SimModel,
    config: SimConfig,
    progress: Progress | None = None,
) -> SimResult:
    """Play `trace` to simulated servers until everything has ended.

    The same arguments give the same result. ConfigError names what does not fit. On
    KeyboardInterrupt the result holds what there was until then.
    """
    run = _Run(trace, cluster, model, config, progress)
    interrupted = False
    try:
        with _no_garbage_collection():
            run.play()
    except KeyboardInterrupt:
        interrupted = True
    return run.result(interrupted)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A run makes millions of objects and hardly a cycle: looking for some takes a third of it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Run:
    """One simulation under way."""

    def __init__(
        self,
        trace: Trace,
        cluster: Cluster,
        model: SimModel,
        config: SimConfig,
        progress: Progress | None,
    ) -> None:
        if any(block >= OUTPUT_TOKEN for request in trace.requests for block in request.blocks):
            raise ConfigError(f"{trace.name}: ids of blocks must be below {OUTPUT_TOKEN}")
        self._trace, self._model, self._config = trace, model, config
        self._cluster, self._progress = cluster, progress
        self._server = server_config(config, cluster, model)
        self._pages = kv_pages(config, self._server, cluster, model)
        attention = self._server.attention
        self._density = density_table(attention.gamma if attention.is_sparse else 1.0)
        self._clock = Clock()
        self._live: dict[int, SimRequest] = {}
        self._requests: list[RequestRow] = []
        self._steps: list[StepRow] = []
        self._layout_models: dict[Lane, Mapping[Layout, CostModel]] = {}
        self._replicas = [self._replica(index) for index in range(config.replicas)]
        self._router = Router(self._replicas, config.seed)

    def play(self) -> None:
        self._clock.at(self._sent_s(0), self._arrive, 0)
        self._clock.run()
        assert not self._live, f"requests {sorted(self._live)} never end"
        for replica in self._replicas:
            replica.scheduler.check_integrity()

    def _sent_s(self, index: int) -> float:
        return self._trace.requests[index].arrival_s / self._config.speed

    def _arrive(self, index: int) -> None:
        if index + 1 < len(self._trace.requests):
            self._clock.at(self._sent_s(index + 1), self._arrive, index + 1)
        traced = self._trace.requests[index]
        request = make_request(
            index, traced, self._trace.block_tokens, self._clock.now, self._attention(traced)
        )
        try:
            self._router.choose(traced).submit(request)
        except CspsError as error:  # what a live server would have answered
            row = request.row(Status.FAILED, self._clock.now, self._density)
            self._note(replace(row, error=str(error)))
            return
        self._live[index] = request

    def _attention(self, request: TraceRequest) -> AttentionParams:
        """As csps.coordinator.frontend decides."""
        if request.prompt_tokens < self._server.csa_min_tokens:
            return DENSE
        return self._server.attention

    def _end(self, request: SimRequest) -> None:
        # One that ends in the call that submits it would not be live yet; a step takes time.
        del self._live[request.index]
        self._note(request.row(Status.DONE, self._clock.now, self._density))

    def _note(self, row: RequestRow) -> None:
        self._requests.append(row)
        if self._progress is not None:
            self._progress(len(self._requests), len(self._trace.requests), self._clock.now)

    def _replica(self, index: int) -> Replica:
        config, server = self._config, self._server
        scheduler = make_scheduler(server, config.max_model_len or UNLIMITED, self._pages)
        sharing: Sharing = FluidSharing()
        costs: StepCosts
        if isinstance(self._cluster, CalibratedCluster):
            lanes = self._cluster.server(config.strategy).lanes
            costs = FittedCosts(lanes, Holdings(scheduler.ledger))
            step_s = {lane: lanes[lane].step_s for lane in scheduler.lanes}
            sharing = MeasuredSharing(lanes)
        else:
            costs = analytic_costs(
                self._cluster, self._model, server, scheduler, config.decode_moves
            )
            step_s = dict.fromkeys(scheduler.lanes, self._cluster.step_s)
        return Replica(
            index,
            self._clock,
            scheduler,
            {lane: self._policy(lane, costs) for lane in scheduler.lanes},
            costs,
            sharing,
            step_s,
            self._steps.append if config.keep_steps else None,
            self._end,
            DecodePace(1e-3 * server.tbt_target_ms),
            config.separate_decode,
        )

    def _policy(self, lane: Lane, costs: StepCosts) -> LayoutPolicy:
        """As csps.coordinator.schedule makes it; each replica's own, for it learns."""
        given = given_layout(self._server, lane)
        if given is not None:
            return given
        if lane not in self._layout_models:  # all replicas would fit the same
            self._layout_models[lane] = layout_models(costs, self._server, lane)
        return CheapestLayout(self._layout_models[lane])

    def result(self, interrupted: bool) -> SimResult:
        now = self._clock.now
        left = [
            self._live[index].row(Status.UNFINISHED, now, self._density)
            for index in sorted(self._live)
        ]
        run = _run_info(self._trace, self._cluster, self._model, self._config, self._server)
        run = replace(
            run, elapsed_s=round(now, 6), pages_per_rank=self._pages, interrupted=interrupted
        )
        return SimResult(run, self._requests + left, self._steps)


def _run_info(
    trace: Trace, cluster: Cluster, model: SimModel, config: SimConfig, server: ServerConfig
) -> RunInfo:
    """Nothing that differs from run to run: no date, machine or command."""
    settings: Mapping[str, Any] = {
        "sp": server.sp,
        "tp": server.setup.tp,
        "weights": model.weights.value,
        "attention": server.attention.kind.value,
        "csa_gamma": server.attention.gamma,
        "csa_min_tokens": server.csa_min_tokens,
        "pipeline": config.pipeline,
        "separate_decode": config.separate_decode,
        "decode_moves": config.decode_moves.value,
        "token_budget": server.token_budget,
        "stage_tokens": server.stage_tokens,
        "long_tokens": server.long_tokens,
        "max_running": server.max_running,
        "prefix_cache": server.prefix_cache,
        "layout": server.layout and server.layout.value,
        "shift_threshold": server.shift_threshold,
        "tbt_target_ms": server.tbt_target_ms,
        "seed": config.seed,
    }
    return RunInfo(
        name=config.name or f"{server.strategy} {trace.name}",
        kind=RunKind.SIMULATED,
        strategy=server.strategy.value,
        model=model.name,
        ranks=server.num_ranks,
        trace=trace.name,
        trace_source=trace.source,
        num_requests=len(trace.requests),
        elapsed_s=0.0,
        block_size=server.setup.block_size,
        pages_per_rank=0,
        cluster=cluster.name,
        replicas=config.replicas,
        speed=config.speed,
        settings=settings,
        slo_ttft_s=config.slo_ttft_s,
        slo_tbt_ms=config.slo_tbt_ms,
    )
