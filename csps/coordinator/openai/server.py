"""Listens for OpenAI's clients."""

import ssl

from aiohttp import web

from csps.coordinator.gate import Gate
from csps.coordinator.openai.app import make_app
from csps.core.attention import AttentionParams
from csps.core.errors import UnavailableError
from csps.rpc.auth import ApiKeys


class OpenAiServer:
    """Serves in the running event loop from `start` to `close`."""

    def __init__(
        self, gate: Gate, attention: AttentionParams, keys: ApiKeys, *, close_s: float
    ) -> None:
        """`attention`, `keys` as in make_app. `close_s`: what answers get to end."""
        self._runner = web.AppRunner(
            make_app(gate, attention, keys),
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,  # a client that leaves ends its request
            shutdown_timeout=close_s,
        )

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> str:
        """Listen; 0 takes a free port. The base URL for clients. UnavailableError if in use."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port, ssl_context=tls).start()
        except OSError as error:
            raise UnavailableError(
                f"--http-port: cannot listen on {host}:{port}: in use, or no address of this "
                "machine"
            ) from error
        scheme = "http" if tls is None else "https"
        return f"{scheme}://{host}:{self._runner.addresses[0][1]}/v1"

    async def close(self) -> None:
        """No new connection; answers under way get a moment, then their connections end."""
        await self._runner.cleanup()
