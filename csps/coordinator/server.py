"""Puts the coordinator together: servers for clients and ranks, the fleet, the engine loop."""

import asyncio
import contextlib
import importlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from csps.checkpoint.chat import load_chat_template
from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.checkpoint.tokenizer import load_tokenizer
from csps.coordinator.admin import AdminService
from csps.coordinator.frontend import Frontend, ServedModel
from csps.coordinator.gate import Gate
from csps.coordinator.launcher import LocalWorkers
from csps.coordinator.loop import EngineLoop
from csps.coordinator.metrics import Metrics
from csps.coordinator.observer import Observer
from csps.coordinator.openai.server import OpenAiServer
from csps.coordinator.schedule import make_layouts, make_scheduler
from csps.coordinator.service import GenerationService
from csps.coordinator.step_feed import StepFeed
from csps.coordinator.step_log import StepLog
from csps.coordinator.steps import row_builder
from csps.coordinator.warm_up import warm_up
from csps.core.config import STAGE_TOKENS, ServerConfig, WorkerSetup
from csps.core.errors import ConfigError, UnavailableError
from csps.core.strategy import lane_layouts
from csps.rpc.auth import ApiKeys, KeyInterceptor
from csps.rpc.fleet import Fleet
from csps.rpc.http_metrics import MetricsServer
from csps.rpc.interceptors import ErrorInterceptor
from csps.rpc.options import SERVER_OPTIONS
from csps.sched.pacing import DecodePace
from csps.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    worker_pb2_grpc,
)

logger = logging.getLogger(__name__)

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name,
)
OPEN_SERVICES = (health.SERVICE_NAME, reflection.SERVICE_NAME)  # to all, with API keys too
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
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
            log = self._config.step_log
            step_log = stack.enter_context(StepLog(log)) if log is not None else None
            metrics, tracer = self._open_metrics(stack), self._open_tracer(stack)
            model = await asyncio.to_thread(load_served_model, self._config.setup)
            fleet = Fleet(self._config)
            gate = Gate()
            service, admin = GenerationService(self._config, gate), AdminService()
            status = health.aio.HealthServicer()
            await self._set_health(status, NOT_SERVING)
            public = await self._open_public(service, admin, status)
            stack.push_async_callback(public.stop, None)
            http = await self._open_openai(gate, stack)
            control = await self._open_control(fleet)
            stack.push_async_callback(control.stop, None)
            await self._open_workers(fleet, stack)
            num_blocks = await self._unless_stopped(fleet.wait_ready())
            if num_blocks is None:
                return
            feed = StepFeed(row_builder(self._config, model.config).row, step_log)
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
            await self._set_health(status, SERVING)
            on_ready(self, model, num_blocks)
            await self._run(frontend.loop, fleet, gate, status)

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

    async def _run(
        self,
        loop: EngineLoop,
        fleet: Fleet,
        gate: Gate,
        status: health.aio.HealthServicer,
    ) -> None:
        """Until told to stop (then live requests get a while to end), or a rank is lost."""
        engine = asyncio.create_task(loop.run())
        heartbeats = asyncio.create_task(fleet.watch_heartbeats())
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({engine, stopped}, return_when=asyncio.FIRST_COMPLETED)
            gate.close()
            await self._set_health(status, NOT_SERVING)
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

    def _open_metrics(self, stack: contextlib.AsyncExitStack) -> Metrics | None:
        port = self._config.metrics_port
        if port is None:
            return None
        metrics = Metrics()
        server = MetricsServer(metrics.registry, self._config.host, port)
        stack.push_async_callback(asyncio.to_thread, server.close)
        self.metrics_url = server.url
        return metrics

    def _open_tracer(self, stack: contextlib.AsyncExitStack) -> Observer | None:
        endpoint = self._config.otlp_endpoint
        if not endpoint:
            return None
        try:
            tracing = importlib.import_module("csps.coordinator.tracing")
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"--otlp-endpoint: {error.name} is not installed: pip install 'csps[otel]'"
            ) from None
        tracer: Observer = tracing.Tracer(endpoint)
        stack.push_async_callback(tracing.Tracer.close, tracer)
        return tracer

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

    async def _open_public(
        self, service: GenerationService, admin: AdminService, status: health.aio.HealthServicer
    ) -> grpc.aio.Server:
        interceptors = [KeyInterceptor(self._keys, OPEN_SERVICES), ErrorInterceptor()]
        server = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
        generation_pb2_grpc.add_GenerationServicer_to_server(service, server)
        admin_pb2_grpc.add_AdminServicer_to_server(admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        reflection.enable_server_reflection((*SERVICES, *OPEN_SERVICES), server)
        self.port = _bind(server, self._config.host, self._config.port, "--port")
        await server.start()
        return server

    async def _open_openai(
        self, gate: Gate, stack: contextlib.AsyncExitStack
    ) -> OpenAiServer | None:
        config = self._config
        if config.http_port is None:
            return None
        server = OpenAiServer(gate, config.attention, self._keys, close_s=CLOSE_S)
        stack.push_async_callback(server.close)
        self.openai_url = await server.start(config.host, config.http_port)
        return server

    async def _open_control(self, fleet: Fleet) -> grpc.aio.Server:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        worker_pb2_grpc.add_WorkerServicer_to_server(fleet, server)
        host = self._config.control_host
        port = _bind(server, host, self._config.control_port, "--control-port")
        self.control_address = f"{host}:{port}"
        await server.start()
        return server

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

    async def _set_health(self, status: health.aio.HealthServicer, value: int) -> None:
        for name in ("", *SERVICES):
            await status.set(name, value)


def _bind(server: grpc.aio.Server, host: str, port: int, flag: str) -> int:
    try:
        return server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:  # its text says less
        raise UnavailableError(
            f"{flag}: cannot listen on {host}:{port}: in use, or no address of this machine"
        ) from error
