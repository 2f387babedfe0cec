"""API keys: what a caller shows, what it is compared with, and what who shows none is told."""

import hmac
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import grpc

from csps.core.errors import UnauthenticatedError
from csps.rpc.interceptors import status_of

KEY_FLAG = "--api-key-file"
KEY_VARIABLE = "CSPS_API_KEY"  # read by the command line's clients
_HOW = (
    "send `authorization: Bearer KEY`, over HTTP as a header, over gRPC as metadata; csps's own "
    f"commands take the key from {KEY_FLAG} or the environment variable {KEY_VARIABLE}"
)


class ApiKeys:
    """Keys of which a caller must show one; there may be none, and then nobody must."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def check(self, authorization: Sequence[str]) -> None:
        """Let a caller pass or raise UnauthenticatedError, whose text never has what was sent.

        `authorization`: every value that the call has under this name.
        """
        if not self._keys:
            return
        if not authorization:
            raise UnauthenticatedError(f"no API key: {_HOW}")
        scheme, _, sent = authorization[0].strip().partition(" ")
        sent = sent.strip()
        if len(authorization) > 1 or scheme.lower() != "bearer" or not sent:
            raise UnauthenticatedError(f"no API key in the authorization that was sent: {_HOW}")
        shown = sent.encode("utf-8", "surrogateescape")
        # Against all of them, each in constant time: the time taken says nothing of any key.
        if not any([hmac.compare_digest(shown, key) for key in self._keys]):
            raise UnauthenticatedError("the API key is unknown to this server")


def authorization(api_key: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a call that shows `api_key`; "" shows none."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls without a key as UNAUTHENTICATED, except those to `open_services`.

    Stands first: nothing is read, decoded or looked up for who may not ask.
    """

    def __init__(self, keys: ApiKeys, open_services: Collection[str]) -> None:
        self._keys = keys
        self._open_services = frozenset(open_services)

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        service = handler_call_details.method.removeprefix("/").partition("/")[0]
        if service not in self._open_services:
            try:
                self._keys.check(
                    [
                        value
                        for name, value in handler_call_details.invocation_metadata
                        if name == "authorization" and isinstance(value, str)
                    ]
                )
            except UnauthenticatedError as error:
                return _refusal(error)
        return await continuation(handler_call_details)


def _refusal(error: UnauthenticatedError) -> "grpc.RpcMethodHandler[Any, Any]":
    async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(status_of(error), str(error))

    # Whatever the method is: only a handler of streams starts before a message has come.
    return grpc.stream_stream_rpc_method_handler(refuse)
