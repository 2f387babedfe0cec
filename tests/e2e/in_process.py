"""Coordinator and rank inside the test's process, where what they remember can be seen."""

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator
from pathlib import Path

from csps.coordinator.server import Server
from csps.core.config import DType, ServerConfig, WorkerSetup
from csps.worker.place import Place
from csps.worker.service import Worker

TIMEOUT_S = 60.0


def only(kind: type) -> object:
    """The one live object of a class."""
    gc.collect()
    (found,) = [thing for thing in gc.get_objects() if isinstance(thing, kind)]
    return found


@contextlib.asynccontextmanager
async def serving(
    model: Path, store: Path, http_port: int | None = None
) -> AsyncIterator[tuple[Server, str]]:
    """A server in this event loop, its one rank in a thread."""
    setup = WorkerSetup(
        str(model), dtype=DType.FLOAT32, block_size=16, threads_per_rank=1, kv_memory_bytes=2**21
    )
    config = ServerConfig(setup, num_ranks=1, max_running=8, stage_tokens=256, http_port=http_port)
    server = Server(config, start_workers=False)
    ready = asyncio.Event()
    serve = asyncio.create_task(server.serve(lambda *_: ready.set()))
    while not server.control_address:
        await asyncio.sleep(0.01)
        assert not serve.done(), serve.exception()
    place = Place(0, 1, 0, 1, f"file://{store}")
    worker = Worker(server.control_address, place, join_timeout_s=TIMEOUT_S)
    rank = threading.Thread(target=worker.run, name="rank")
    rank.start()
    try:
        await asyncio.wait_for(ready.wait(), TIMEOUT_S)
        yield server, f"127.0.0.1:{server.port}"
    finally:
        server.stop()
        await asyncio.wait_for(serve, TIMEOUT_S)
        await asyncio.to_thread(rank.join, TIMEOUT_S)
    assert not rank.is_alive()
