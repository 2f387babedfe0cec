"""API keys over HTTP."""

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from csps.rpc.auth import ApiKeys

OPEN_PATH = "/health"  # for probes


def key_check(keys: ApiKeys) -> Middleware:
    """UnauthenticatedError without a key, before the body is read; only OPEN_PATH needs none."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path != OPEN_PATH:
            keys.check(request.headers.getall("Authorization", []))
        return await handler(request)

    return check
