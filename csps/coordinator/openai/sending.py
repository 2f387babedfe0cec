"""From live requests to an HTTP answer, whole or as a stream of server-sent events.

A stream has comments while the prompt waits and is prefilled (": prefilled 2048 of 8000 tokens"),
which OpenAI's clients skip: they show progress, and keep proxies from closing a silent connection.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Sequence

import pydantic_core
from aiohttp import web

from csps.coordinator.frontend import Frontend, Piece
from csps.coordinator.live import Prefilled
from csps.coordinator.openai.answers import Choice, Json, usage
from csps.coordinator.openai.errors import describe
from csps.core.request import FinishReason

KEEP_ALIVE_S = 10.0


class Answer:
    """The choices of one request, sent whole or as they grow."""

    def __init__(
        self, front: Frontend, choices: Sequence[Choice], request_id: str, num_prompts: int
    ) -> None:
        self._front = front
        self._choices = choices
        self._request_id = request_id
        self._num_prompts = num_prompts
        self._headers = {"X-Request-Id": request_id}
        self._created = int(time.time())

    async def whole(self) -> web.Response:
        finished: dict[Choice, FinishReason] = {}

        async def collect(choice: Choice) -> None:
            async with contextlib.aclosing(self._front.stream(choice.live)) as events:
                async for event in events:
                    if isinstance(event, Piece):
                        choice.take(event)
                    elif isinstance(event, FinishReason):
                        finished[choice] = event

        await _all([collect(choice) for choice in self._choices])
        answer = self._object(
            self._choices[0].name, [choice.whole(finished[choice]) for choice in self._choices]
        )
        answer["usage"] = usage(self._choices, self._num_prompts)
        return web.Response(
            body=pydantic_core.to_json(answer),
            content_type="application/json",
            headers=self._headers,
        )

    async def stream(self, request: web.Request, with_usage: bool) -> web.StreamResponse:
        """Errors from here on come as an event: the status is sent."""
        response = web.StreamResponse(
            headers=self._headers
            | {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        name = self._choices[0].part_name
        extra: Json = {"usage": None} if with_usage else {}
        try:
            await response.prepare(request)
            await response.write(b": queued\n\n")
            async with _kept_alive(response):
                await _all([self._send(response, choice, extra) for choice in self._choices])
            if with_usage:
                counted = {"usage": usage(self._choices, self._num_prompts)}
                await _send(response, self._object(name, []) | counted)
            await response.write(b"data: [DONE]\n\n")
        except ConnectionError:
            return response  # the client is gone; so is its work, when the handler ends
        except Exception as error:
            _, body, _ = describe(error)
            with contextlib.suppress(ConnectionError):
                await _send(response, body)
        await response.write_eof()
        return response

    async def _send(self, response: web.StreamResponse, choice: Choice, extra: Json) -> None:
        total = len(choice.live.seq.prompt_ids)
        async with contextlib.aclosing(self._front.stream(choice.live)) as events:
            async for event in events:
                if isinstance(event, Prefilled):
                    done = min(event.num_tokens, total)
                    await response.write(f": prefilled {done} of {total} tokens\n\n".encode())
                    continue
                part = choice.part(event) if isinstance(event, Piece) else choice.last_part(event)
                if part is not None:
                    await _send(response, self._object(choice.part_name, [part]) | extra)

    def _object(self, name: str, choices: Sequence[Json]) -> Json:
        return {
            "id": self._request_id,
            "object": name,
            "created": self._created,
            "model": self._front.model.name,
            "choices": choices,
        }


async def _all(tasks: Sequence[Awaitable[None]]) -> None:
    """Run them at once; the first error ends the others and is raised itself, not in a group."""
    if len(tasks) == 1:
        return await tasks[0]
    running = [asyncio.ensure_future(task) for task in tasks]
    try:
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@contextlib.asynccontextmanager
async def _kept_alive(response: web.StreamResponse) -> AsyncIterator[None]:
    async def beat() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await asyncio.sleep(KEEP_ALIVE_S)
                await response.write(b": waiting\n\n")

    beats = asyncio.create_task(beat())
    try:
        yield
    finally:
        beats.cancel()
        await asyncio.gather(beats, return_exceptions=True)


async def _send(response: web.StreamResponse, event: Json) -> None:
    await response.write(b"data: " + pydantic_core.to_json(event) + b"\n\n")
