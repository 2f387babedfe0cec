"""The door that requests of every protocol come through."""

import contextlib
import time
from collections.abc import Iterator

from csps.coordinator.frontend import Frontend
from csps.core.errors import CspsError, UnavailableError


class Gate:
    """Shut (UnavailableError) until `open` has a frontend to lead to, and after `close`."""

    def __init__(self) -> None:
        self._frontend: Frontend | None = None
        self._closed = False
        self._opened = 0.0

    def open(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._opened = time.monotonic()

    def close(self) -> None:
        """Refuse new requests from now on; those that are live may end."""
        self._closed = True

    def forget(self) -> None:
        """The server has ended. aiohttp remembers handlers, and they the gate: it leads nowhere."""
        self._closed = True
        self._frontend = None

    @property
    def is_open(self) -> bool:
        return self._frontend is not None and not self._closed

    @property
    def uptime_s(self) -> float:
        """Since `open`."""
        return time.monotonic() - self._opened

    @property
    def front(self) -> Frontend:
        """For questions, which are answered from `open` to `forget`, else UnavailableError."""
        if self._frontend is None:
            raise UnavailableError(f"the server is {'stopping' if self._closed else 'starting'}")
        return self._frontend

    @contextlib.contextmanager
    def admitting(self) -> Iterator[Frontend]:
        """For requests: a CspsError raised while one is made and submitted is one refused."""
        front = self.front
        try:
            if self._closed:
                raise UnavailableError("the server is stopping")
            yield front
        except CspsError as error:
            front.loop.refused(error)
            raise
