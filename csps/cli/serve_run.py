"""Runs the coordinator of `csps serve` until a signal ends it."""

import asyncio
import json
import os
import signal
from pathlib import Path

from csps.cli.terminal import console
from csps.coordinator.frontend import ServedModel
from csps.coordinator.server import Server
from csps.core.config import ServerConfig
from csps.core.errors import ConfigError


async def run_server(config: ServerConfig, *, start_workers: bool, ready_file: Path | None) -> None:
    """Serve until a signal. `ready_file` is written once requests are accepted."""
    server = Server(config, start_workers=start_workers)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop)

    def on_ready(server: Server, model: ServedModel, num_blocks: int) -> None:
        address = f"{config.host}:{server.port}"
        console.print(
            f"[bold green]ready[/]: {model.name} on [bold]{address}[/], "
            f"{config.strategy}, {config.num_ranks} ranks, context {model.max_model_len} tokens, "
            f"KV for {num_blocks * config.setup.block_size * config.kv_shards} tokens",
            soft_wrap=True,
        )
        if server.openai_url:
            console.print(f"OpenAI's protocol at {server.openai_url}", soft_wrap=True)
        if server.metrics_url:
            console.print(f"metrics at {server.metrics_url}", soft_wrap=True)
        if ready_file is not None:
            ready = {"target": address, "port": server.port, "model": model.name}
            ready |= {"openai": server.openai_url, "metrics": server.metrics_url}
            _write_ready(ready_file, json.dumps(ready))

    await server.serve(on_ready)


def _write_ready(path: Path, text: str) -> None:
    """In one move: whoever waits for the file must never read half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"--ready-file: {path}: {error.strerror}") from error
