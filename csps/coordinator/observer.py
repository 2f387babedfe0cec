"""Who wants to know what the engine does."""

from csps.coordinator.live import LiveRequest
from csps.coordinator.steps import FinishedStep
from csps.core.errors import CspsError


class Observer:
    """Overrides what it wants to know.

    Called in the event loop's thread, where every stream waits for it: it returns at once and
    raises nothing.
    """

    def on_step(self, step: FinishedStep) -> None:
        """All ranks have finished a step."""

    def on_token(self, live: LiveRequest, gap_s: float | None) -> None:
        """A request got a token, `gap_s` seconds after the one before; None if it is the first."""

    def on_end(self, live: LiveRequest) -> None:
        """A request's stream is over; `live.status` says how. Once per request."""

    def on_refused(self, error: CspsError) -> None:
        """A request was not taken."""
