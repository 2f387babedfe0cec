"""csps.v1.Admin: what the server does, as it does it."""

import logging

import grpc

from csps.coordinator.step_feed import StepFeed
from csps.core.errors import InvalidRequestError, UnavailableError
from csps.v1 import admin_pb2 as pb
from csps.v1 import admin_pb2_grpc

MAX_QUEUED = 65_536
DEFAULT_QUEUED = 4096

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[object, object]


class AdminService(admin_pb2_grpc.AdminServicer):
    """Serves as soon as the port is open; UNAVAILABLE until `start` gives it steps."""

    def __init__(self) -> None:
        self._feed: StepFeed | None = None

    def start(self, feed: StepFeed) -> None:
        self._feed = feed

    async def WatchSteps(self, request: pb.WatchStepsRequest, context: Context) -> None:
        feed = self._feed
        if feed is None:
            raise UnavailableError("the server is starting")
        if request.max_queued > MAX_QUEUED:
            raise InvalidRequestError(
                "max_queued", f"must be at most {MAX_QUEUED}, got {request.max_queued}"
            )
        watcher = feed.watch(request.max_queued or DEFAULT_QUEUED)
        response: pb.WatchStepsResponse | None = pb.WatchStepsResponse()
        try:
            while response is not None:
                await context.write(response)
                response = await watcher.take()
        except grpc.aio.InternalError as error:
            # The client went while a message waited for it: no error of ours.
            logger.debug("a watcher has gone: %s", error)
        finally:
            feed.forget(watcher)
