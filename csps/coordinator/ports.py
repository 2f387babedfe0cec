"""What the coordinator opens to others: its ports, and the way its spans go.

Each of these functions leaves the end of what it opens on the `stack` it is given.
"""

import asyncio
import contextlib
import importlib

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from csps.coordinator.admin import AdminService
from csps.coordinator.gate import Gate
from csps.coordinator.metrics import Metrics
from csps.coordinator.observer import Observer
from csps.coordinator.openai.server import OpenAiServer
from csps.coordinator.service import GenerationService
from csps.core.config import ServerConfig, ServerTls
from csps.core.errors import ConfigError, UnavailableError
from csps.rpc.auth import ApiKeys, KeyInterceptor
from csps.rpc.fleet import Fleet
from csps.rpc.http_metrics import MetricsServer
from csps.rpc.interceptors import ErrorInterceptor
from csps.rpc.options import SERVER_OPTIONS
from csps.rpc.tls import http_context, server_credentials
from csps.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    worker_pb2_grpc,
)

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name,
)
OPEN_SERVICES = (health.SERVICE_NAME, reflection.SERVICE_NAME)  # to all, with API keys too
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """What gRPC's health service says of the server, and of each of its services."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()

    async def set(self, serving: bool) -> None:
        for name in ("", *SERVICES):
            await self.servicer.set(name, SERVING if serving else NOT_SERVING)


def open_metrics(
    config: ServerConfig, stack: contextlib.AsyncExitStack
) -> tuple[Metrics | None, str]:
    """Metrics and their URL; None and "" if nobody wants them."""
    if config.metrics_port is None:
        return None, ""
    metrics = Metrics()
    server = MetricsServer(metrics.registry, config.host, config.metrics_port)
    stack.push_async_callback(asyncio.to_thread, server.close)
    return metrics, server.url


def open_tracer(endpoint: str, stack: contextlib.AsyncExitStack) -> Observer | None:
    """Sends spans to `endpoint`, unless that is "". ConfigError if it cannot."""
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


async def open_public(
    config: ServerConfig,
    keys: ApiKeys,
    services: tuple[GenerationService, AdminService, Health],
    stack: contextlib.AsyncExitStack,
) -> tuple[grpc.aio.Server, int]:
    """gRPC for clients, and its port. UnavailableError if that is in use."""
    service, admin, status = services
    interceptors = [KeyInterceptor(keys, OPEN_SERVICES), ErrorInterceptor()]
    server = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
    generation_pb2_grpc.add_GenerationServicer_to_server(service, server)
    admin_pb2_grpc.add_AdminServicer_to_server(admin, server)
    health_pb2_grpc.add_HealthServicer_to_server(status.servicer, server)
    reflection.enable_server_reflection((*SERVICES, *OPEN_SERVICES), server)
    port = _bind(server, config.host, config.port, "--port", config.tls)
    await server.start()
    stack.push_async_callback(server.stop, None)
    return server, port


async def open_openai(
    config: ServerConfig,
    keys: ApiKeys,
    gate: Gate,
    close_s: float,
    stack: contextlib.AsyncExitStack,
) -> tuple[OpenAiServer | None, str]:
    """OpenAI's protocol and its base URL; None and "" if nobody wants it. Errors as above.

    `close_s`: what answers under way get when it ends.
    """
    if config.http_port is None:
        return None, ""
    server = OpenAiServer(gate, config.attention, keys, close_s=close_s)
    stack.push_async_callback(server.close)
    tls = None if config.tls is None else http_context(config.tls)
    return server, await server.start(config.host, config.http_port, tls)


async def open_control(config: ServerConfig, fleet: Fleet, stack: contextlib.AsyncExitStack) -> str:
    """Where ranks join: its address. Errors as above."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    worker_pb2_grpc.add_WorkerServicer_to_server(fleet, server)
    port = _bind(server, config.control_host, config.control_port, "--control-port")
    await server.start()
    stack.push_async_callback(server.stop, None)
    return f"{config.control_host}:{port}"


def _bind(
    server: grpc.aio.Server, host: str, port: int, flag: str, tls: ServerTls | None = None
) -> int:
    address = f"{host}:{port}"
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, server_credentials(tls))
    except RuntimeError as error:  # its text says less
        or_tls = "" if tls is None else ", or gRPC knows no such key as --tls-key"
        raise UnavailableError(
            f"{flag}: cannot listen on {address}: in use, or no address of this machine{or_tls}"
        ) from error
