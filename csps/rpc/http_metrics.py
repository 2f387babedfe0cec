"""Serves a registry of metrics to Prometheus: GET /metrics."""

from prometheus_client import CollectorRegistry, start_http_server

from csps.core.errors import ConfigError


class MetricsServer:
    """Serves from threads of its own until `close`; port 0 takes a free one.

    ConfigError if it cannot listen.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError(
                f"--metrics-port: cannot listen on {host}:{port}: {error.strerror}"
            ) from None
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Blocks for half a second at most."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
