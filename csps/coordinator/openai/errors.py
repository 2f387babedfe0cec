"""Errors to HTTP statuses and OpenAI's error object."""

import logging
import math
from http import HTTPStatus

from csps.coordinator.openai.answers import Json
from csps.core import errors

logger = logging.getLogger(__name__)

_STATUS = {
    errors.InvalidRequestError: HTTPStatus.BAD_REQUEST,
    errors.ContextLengthError: HTTPStatus.BAD_REQUEST,
    errors.OverloadedError: HTTPStatus.TOO_MANY_REQUESTS,
    errors.DuplicateRequestError: HTTPStatus.CONFLICT,
    errors.UnknownRequestError: HTTPStatus.NOT_FOUND,
    errors.UnauthenticatedError: HTTPStatus.UNAUTHORIZED,
    errors.DeadlineError: HTTPStatus.GATEWAY_TIMEOUT,
    errors.UnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
}

_TYPE = {
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "service_unavailable_error",
    HTTPStatus.INTERNAL_SERVER_ERROR: "server_error",
    HTTPStatus.GATEWAY_TIMEOUT: "server_error",
}


def status_of(error: Exception) -> HTTPStatus:
    """INTERNAL_SERVER_ERROR, for a bug, where an error is not meant for clients."""
    if isinstance(error, errors.InvalidRequestError) and error.field == "model":
        return HTTPStatus.NOT_FOUND
    return _STATUS.get(type(error), HTTPStatus.INTERNAL_SERVER_ERROR)


def body_of(status: int, text: str, param: str | None = None, code: str | None = None) -> Json:
    """OpenAI's object for an error."""
    kind = _TYPE.get(HTTPStatus(status), "invalid_request_error")
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[HTTPStatus, Json, dict[str, str]]:
    """Status, body and headers of an error; one that is not meant for clients is logged."""
    status = status_of(error)
    if status is HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("unexpected error", exc_info=error)
        return status, body_of(status, f"{type(error).__name__}: {error}"), {}
    headers = {}
    if isinstance(error, errors.OverloadedError):
        headers["Retry-After"] = f"{math.ceil(error.retry_after_s)}"
    param = error.field if isinstance(error, errors.InvalidRequestError) else None
    code = None
    if isinstance(error, errors.UnauthenticatedError):
        code = "invalid_api_key"
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, errors.ContextLengthError):
        code = "context_length_exceeded"
    elif status is HTTPStatus.NOT_FOUND and param == "model":
        code = "model_not_found"
    return status, body_of(status, str(error), param, code), headers
