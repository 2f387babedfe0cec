"""Errors with a meaning for the client; rpc/interceptors maps each to its gRPC status."""


class CspsError(Exception):
    """Base of every error a caller is meant to see: its text is the message shown."""


class InvalidRequestError(CspsError):
    """The request can never succeed as sent (INVALID_ARGUMENT)."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class ContextLengthError(InvalidRequestError):
    """Prompt and output do not fit the model's context (INVALID_ARGUMENT)."""


class OverloadedError(CspsError):
    """The request is fine, the server is full (RESOURCE_EXHAUSTED)."""

    def __init__(self, problem: str, retry_after_s: float) -> None:
        super().__init__(f"{problem}; retry after {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class DuplicateRequestError(CspsError):
    """A live request already has this id (ALREADY_EXISTS)."""


class UnknownRequestError(CspsError):
    """No live request has this id (NOT_FOUND)."""


class UnauthenticatedError(CspsError):
    """The caller showed no API key, or an unknown one (UNAUTHENTICATED)."""


class DeadlineError(CspsError):
    """The client's deadline passed before the request ended (DEADLINE_EXCEEDED)."""


class UnavailableError(CspsError):
    """The server cannot serve now: starting, stopping, or a rank was lost (UNAVAILABLE)."""


class CheckpointError(CspsError):
    """A model on disk cannot be served; the text names the architecture, key or tensor."""


class ConfigError(CspsError):
    """A flag or a combination of flags is wrong; the text names the flag."""
