"""`csps worker`: one rank."""

import faulthandler
import importlib
import logging
import os
from typing import Annotated

import typer

from csps.cli.terminal import print_error, start_logging
from csps.core.errors import CspsError
from csps.rpc.http_metrics import MetricsServer

logger = logging.getLogger(__name__)


def worker(
    coordinator: Annotated[str, typer.Option(help="HOST:PORT given to serve --control.")],
    rank: Annotated[int, typer.Option(min=0, envvar="RANK")] = 0,
    world_size: Annotated[int, typer.Option(min=1, envvar="WORLD_SIZE")] = 1,
    local_rank: Annotated[int, typer.Option(min=0, envvar="LOCAL_RANK")] = 0,
    local_world_size: Annotated[int, typer.Option(min=1, envvar="LOCAL_WORLD_SIZE")] = 1,
    rendezvous: Annotated[
        str, typer.Option(help="Where ranks meet; env:// is torchrun's.")
    ] = "env://",
    join_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds to wait for the coordinator to be there.")
    ] = 300.0,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Serve this rank's Prometheus metrics at http://METRICS_HOST:PORT/metrics, PORT "
            "being this plus the local rank; 0 picks a free one, which is logged. Default: none.",
        ),
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of --metrics-port.")] = "127.0.0.1",
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, ...")] = "INFO",
) -> None:
    """Run one rank: torchrun --nproc-per-node 8 ... -m csps worker --coordinator HOST:PORT."""
    start_logging(log_level)
    faulthandler.enable()
    # Before CUDA starts: two lanes and their communicators have more streams than the 8 queues that
    # a GPU's streams share by default, and a transfer must never queue behind the other lane's.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    # torch takes seconds to import, and of all roles this one alone needs it.
    service = importlib.import_module("csps.worker.service")
    place = importlib.import_module("csps.worker.place").Place(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        rendezvous=rendezvous,
    )
    status = 1
    metrics = None
    try:
        if metrics_port is not None:
            metrics = importlib.import_module("csps.worker.metrics").WorkerMetrics(rank)
            port = metrics_port + local_rank if metrics_port else 0
            server = MetricsServer(metrics.registry, metrics_host, port)
            logger.info("rank %d: metrics at %s", rank, server.url)
        service.Worker(coordinator, place, join_timeout_s=join_timeout, metrics=metrics).run()
        status = 0
    except CspsError as error:
        print_error(error)
    except Exception:
        logger.exception("rank %d failed", rank)
    # At once: a thread may be inside a transfer with a rank that is gone, and the interpreter
    # would wait for it.
    logging.shutdown()
    os._exit(status)
