"""Errors to statuses, for every method: what a client sees when something is wrong."""

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from csps.core import errors

logger = logging.getLogger(__name__)

STATUS = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ContextLengthError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DuplicateRequestError: grpc.StatusCode.ALREADY_EXISTS,
    errors.UnknownRequestError: grpc.StatusCode.NOT_FOUND,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
}


def status_of(error: Exception) -> grpc.StatusCode:
    """What a client gets for an error; INTERNAL, for a bug, where it is not meant for one."""
    return STATUS.get(type(error), grpc.StatusCode.INTERNAL)


@dataclass(frozen=True, slots=True)
class _Undecodable:
    """Stands for a request whose bytes are not the message they should be."""

    reason: str


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns CspsError into its status, undecodable requests into INVALID_ARGUMENT.

    Anything else is a bug: it is logged with its traceback and ends as INTERNAL.
    """

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler  # Attach: its errors are the fleet's own
        decode = _decoder(handler.request_deserializer)
        if handler.response_streaming:
            # A method may also be a coroutine that writes to its context (health's Watch is).
            is_generator = inspect.isasyncgenfunction(handler.unary_stream)
            wrap = _stream if is_generator else _unary
            return grpc.unary_stream_rpc_method_handler(
                wrap(handler.unary_stream), decode, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _unary(handler.unary_unary), decode, handler.response_serializer
        )


def _decoder(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    assert decode is not None, "generated handlers have a decoder"

    def checked(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            # gRPC itself would answer INTERNAL.
            return _Undecodable(f"not a valid message (strings must be UTF-8): {error}")

    return checked


def _check(request: Any) -> None:
    if isinstance(request, _Undecodable):
        raise errors.InvalidRequestError("request", request.reason)


def _unary(behavior: Callable[..., Any] | None) -> Callable[..., Any]:
    assert behavior is not None, "a handler has the method of its kind"

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            _check(request)
            return await behavior(request, context)
        except Exception as error:
            await _abort(error, context)

    return call


def _stream(behavior: Callable[..., Any] | None) -> Callable[..., Any]:
    assert behavior is not None, "a handler has the method of its kind"

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            _check(request)
            async for response in behavior(request, context):
                yield response
        except Exception as error:
            await _abort(error, context)

    return call


async def _abort(error: Exception, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    status = STATUS.get(type(error))
    if status is None:
        logger.exception("unexpected error", exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
    metadata: tuple[tuple[str, str], ...] = ()
    if isinstance(error, errors.OverloadedError):
        metadata = (("retry-after", f"{error.retry_after_s:.0f}"),)
    await context.abort(status, str(error), trailing_metadata=metadata)
