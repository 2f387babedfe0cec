"""Puts the coordinator together: servers for clients and ranks, the fleet, the engine loop."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from csps.checkpoint.chat import load_chat_template
from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.checkpoint.tokenizer import load_tokenizer
from csps.coordinator.admin import AdminService
from csps.coordinator.frontend import Frontend, ServedModel
from csps.coordinator.gate import Gate
from csps.coordinator.launcher import LocalWorkers
from csps.coordinator.loop import EngineLoop
from csps.coordinator.observer import Observer
from csps.coordinator.ports import (
    Health,
    open_control,
    open_metrics,
    open_openai,
    open_public,
    open_tracer,
)
from csps.coordinator.schedule import make_layouts, make_scheduler
from csps.coordinator.service import GenerationService
from csps.coordinator.step_feed import StepFeed
from csps.coordinator.step_log import StepLog
from csps.coordinator.steps import row_builder
from csps.coordinator.warm_up import warm_up
from csps.core.config import STAGE_TOKENS, ServerConfig, WorkerSetup
from csps.core.errors import ConfigError, UnavailableError
from csps.core.strategy import lane_layouts
from csps.rpc.auth import ApiKeys
from csps.rpc.fleet import Fleet
from csps.sched.pacing import DecodePace

logger = logging.getLogger(__name__)

DRAIN_S = 5.0  # live requests may end by themselves
CLOSE_S = 1.0  # the others are told why they end
LEAVE_S = 5.0  # ranks finish their steps

_T = TypeVar("_T")


def load_served_model(setup: WorkerSetup) -> ServedModel:
    """Config, tokenizer and template; no weights. Blocking: call it in a thread."""
    checkpoint = locate(setup.model)
    config = read_config(checkpoint, setup.rope_scaling)
    if setup.max_model_len > config.max_position:
        raise ConfigError(
            f"--max-model-len: {setup.max_model_len} exceeds the model's context of "
            f"{config.max_position} tokens; --rope-scaling makes it longer"
        )
    template = load_chat_template(checkpoint)
    return ServedModel(
        name=checkpoint.name,
        config=config,
        max_model_len=setup.max_model_len or config.max_position,
        tokenizer=load_tokenizer(checkpoint),
        chat_template=template,
        has_chat_template=template.is_available,
    )


class Server:
    """One coordinator. `serve` returns after `stop` and raises when a rank is lost."""

    def __init__(self, config: ServerConfig, *, start_workers: bool) -> None:
        self._config = config
        self._keys = ApiKeys(config.api_keys)
        self._start_workers = start_workers
        self._stop = asyncio.Event()
        self.port = 0
        self.control_address = ""
        self.metrics_url = ""
        self.openai_url = ""

    def stop(self) -> None:
        """Ask `serve` to end: no new requests, a short drain, then the ranks."""
        self._stop.set()

    async def serve(self, on_ready: Callable[["Server", ServedModel, int], None]) -> None:
        """Serve until `stop`. `on_ready(server, model, blocks per rank)` is called once."""
        # What is pushed last ends first: streams, then the threads they use, ranks, ports.
        async with contextlib.AsyncExitStack() as stack:
            config, log = self._config, self._config.step_log
            step_log = stack.enter_context(StepLog(log)) if log is not None else None
            metrics, self.metrics_url = open_metrics(config, stack)
            tracer = open_tracer(config.otlp_endpoint, stack)
            model = await asyncio.to_thread(load_served_model, config.setup)
            fleet = Fleet(config)
            gate = Gate()
            stack.callback(gate.forget)
            service, admin, health = GenerationService(config, gate), AdminService(), Health()
            await health.set(False)
            services = service, admin, health
            public, self.port = await open_public(config, self._keys, services, stack)
            http, self.openai_url = await open_openai(config, self._keys, gate, CLOSE_S, stack)
            self.control_address = await open_control(config, fleet, stack)
            await self._open_workers(fleet, stack)
            num_blocks = await self._unless_stopped(fleet.wait_ready())
            if num_blocks is None:
                return
            feed = StepFeed(row_builder(config, model.config).row, step_log)
            observers = [one for one in (feed, metrics, tracer) if one is not None]
            frontend = await self._unless_stopped(
                self._frontend(model, fleet, num_blocks, observers)
            )
            if frontend is None:
                return
            stack.callback(frontend.close)
            stack.push_async_callback(public.stop, CLOSE_S)
            if http is not None:
                stack.push_async_callback(http.close)
            await stack.enter_async_context(feed)
            if metrics is not None:
                metrics.watch(frontend.loop.scheduler)
            service.start(fleet.attention_backends)
            admin.start(feed)
            gate.open(frontend)
            await health.set(True)
            on_ready(self, model, num_blocks)
            await self._run(frontend.loop, fleet, gate, health)

    async def _unless_stopped(self, work: Coroutine[Any, Any, _T]) -> _T | None:
        """What `work` returns; None if told to stop before that."""
        task = asyncio.create_task(work)
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return None if stopped.done() else task.result()
        finally:
            task.cancel()
            stopped.cancel()

    async def _run(self, loop: EngineLoop, fleet: Fleet, gate: Gate, health: Health) -> None:
        """Until told to stop (then live requests get a while to end), or a rank is lost."""
        engine = asyncio.create_task(loop.run())
        heartbeats = asyncio.create_task(fleet.watch_heartbeats())
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({engine, stopped}, return_when=asyncio.FIRST_COMPLETED)
            gate.close()
            await health.set(False)
            deadline = time.monotonic() + DRAIN_S
            # Polled: the streams, the engine and the clock can each end this short wait.
            while loop.num_live and not engine.done() and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            if engine.done():
                engine.result()
        finally:
            fleet.stop()  # before the engine: nobody waits for the steps under way any more
            loop.fail(UnavailableError("the server is stopping"))
            for task in (engine, heartbeats, stopped):
                task.cancel()
            await asyncio.gather(engine, heartbeats, stopped, return_exceptions=True)

    async def _frontend(
        self, model: ServedModel, fleet: Fleet, num_blocks: int, observers: Sequence[Observer]
    ) -> Frontend:
        config = self._config
        # The slowest device sets the pace of all.
        stage_tokens = config.stage_tokens or min(STAGE_TOKENS[name] for name in fleet.devices)
        config = replace(config, stage_tokens=stage_tokens)
        scheduler = make_scheduler(config, model.max_model_len, num_blocks)
        if config.warm_up or (config.warm_up is None and "cuda" in fleet.devices):
            lane = scheduler.lanes[0]
            tried = lane_layouts(config.strategy, lane, config.layout)
            await warm_up(fleet, scheduler, lane, tried, config.attention)
        layouts = await make_layouts(config, fleet, scheduler)
        return Frontend(
            model,
            EngineLoop(
                scheduler,
                fleet,
                layouts,
                observers,
                DecodePace(1e-3 * config.tbt_target_ms),
                async_scheduling=config.setup.async_scheduling,
            ),
            placement=config.setup.placement,
            csa_min_tokens=config.csa_min_tokens,
        )

    async def _open_workers(self, fleet: Fleet, stack: contextlib.AsyncExitStack) -> None:
        config = self._config
        if not self._start_workers:
            stack.push_async_callback(fleet.shutdown, LEAVE_S)
            logger.info(
                "waiting for %d ranks: torchrun ... -m csps worker --coordinator %s",
                config.num_ranks,
                self.control_address,
            )
            return
        port = config.metrics_port
        workers = LocalWorkers(
            config.num_ranks,
            self.control_address,
            config.setup.threads_per_rank,
            metrics=(config.host, port) if port is not None else None,
        )
        stack.push_async_callback(workers.stop, LEAVE_S)
        stack.callback(fleet.stop)
        await workers.start()

        async def watch() -> None:
            fleet.report_lost(await workers.wait_any())

        watcher = asyncio.create_task(watch())
        stack.callback(watcher.cancel)
