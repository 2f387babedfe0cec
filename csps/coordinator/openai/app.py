"""Routes of the OpenAI endpoint, and the way from a body to live requests."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from http import HTTPStatus

from aiohttp import web
from aiohttp.typedefs import Handler

from csps.coordinator.frontend import TRACE_CONTEXT, Frontend, Prompt
from csps.coordinator.gate import Gate
from csps.coordinator.live import LiveRequest
from csps.coordinator.openai.answers import ChatChoice, Choice, Json, TextChoice
from csps.coordinator.openai.errors import body_of, describe
from csps.coordinator.openai.keys import OPEN_PATH, key_check
from csps.coordinator.openai.schema import (
    MAX_CHOICES,
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    parse,
)
from csps.coordinator.openai.sending import Answer
from csps.core.attention import AttentionParams
from csps.core.errors import InvalidRequestError
from csps.core.request import SamplingParams
from csps.rpc.auth import ApiKeys
from csps.rpc.options import MAX_MESSAGE_BYTES


def make_app(gate: Gate, attention: AttentionParams, keys: ApiKeys) -> web.Application:
    """`attention`: of requests that do not choose. `keys`: one of which callers must show."""
    api = _Api(gate, attention)
    app = web.Application(middlewares=[_errors, key_check(keys)], client_max_size=MAX_MESSAGE_BYTES)
    app.add_routes(
        [
            web.post("/v1/chat/completions", api.chat_completions),
            web.post("/v1/completions", api.completions),
            web.get("/v1/models", api.models),
            web.get("/v1/models/{model}", api.model),
            web.get(OPEN_PATH, api.health),
        ]
    )
    return app


class _Api:
    def __init__(self, gate: Gate, attention: AttentionParams) -> None:
        self._gate = gate
        self._attention = attention
        self._created = int(time.time())

    async def health(self, request: web.Request) -> web.Response:
        """200 when requests are taken, 503 before and at the end."""
        if not self._gate.is_open:
            return web.json_response({"status": "unavailable"}, status=503)
        return web.json_response({"status": "ok"})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: web.Request) -> web.Response:
        asked, model = request.match_info["model"], self._model()
        if asked != model["id"]:
            raise InvalidRequestError("model", f"{asked!r} is not served, {model['id']!r} is")
        return web.json_response(model)

    def _model(self) -> Json:
        model = self._gate.front.model
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "csps",
            "max_model_len": model.max_model_len,
        }

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, ChatRequest, ChatChoice)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, CompletionRequest, TextChoice)

    async def _serve(
        self,
        request: web.Request,
        kind: type[ChatRequest] | type[CompletionRequest],
        choice_kind: type[Choice],
    ) -> web.StreamResponse:
        data = await request.read()
        front: Frontend | None = None
        lives: list[LiveRequest] = []
        request_id = request.headers.get("X-Request-Id", "")
        request_id = request_id or f"{choice_kind.prefix}-{secrets.token_hex(12)}"
        try:
            with self._gate.admitting() as front:
                # In a thread: a long document is a long body.
                body: AnyRequest = await asyncio.to_thread(parse, kind, data)  # type: ignore[arg-type]
                await self._submit(front, body, request_id, _trace_context(request), lives)
            choices = [
                choice_kind(index, live, front.model.tokenizer) for index, live in enumerate(lives)
            ]
            answer = Answer(front, choices, request_id, len(lives) // (body.n or 1))
            if not body.stream:
                return await answer.whole()
            with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return await answer.stream(request, with_usage)
        finally:
            # However it ended: also when the client left before a stream had begun.
            if front is not None:
                for live in lives:
                    front.loop.close(live)

    async def _submit(
        self,
        front: Frontend,
        body: AnyRequest,
        request_id: str,
        trace_context: dict[str, str],
        lives: list[LiveRequest],
    ) -> None:
        """Submit each prompt `n` times, into `lives`: also those submitted before an error."""
        prompts: Sequence[Prompt] = body.prompts()
        num_each = body.n or 1
        num_choices = num_each * len(prompts)
        if num_choices > MAX_CHOICES:
            raise InvalidRequestError(
                "n", f"{num_choices} choices (n for each prompt), at most {MAX_CHOICES}"
            )
        sampling = body.sampling()
        attention = (
            self._attention if body.attention is None else body.attention.over(self._attention)
        )
        for prompt in prompts:
            for number in range(num_each):
                index = len(lives)
                live = await front.submit(
                    request_id if num_choices == 1 else f"{request_id}-{index}",
                    body.model,
                    prompt if number == 0 else lives[-1].seq.prompt_ids,
                    _of_choice(index, sampling),
                    attention,
                    trace_context=trace_context,
                )
                lives.append(live)


def _of_choice(index: int, sampling: SamplingParams) -> SamplingParams:
    """The first choice's seed is the request's own, right or wrong: the frontend looks at it."""
    if sampling.seed is None or index == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + index) % 2**63)


def _trace_context(request: web.Request) -> dict[str, str]:
    return {key: request.headers[key] for key in TRACE_CONTEXT if key in request.headers}


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error as OpenAI's clients read it; what is no CspsError is a bug, and logged."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < HTTPStatus.BAD_REQUEST:
            raise
        text = f"{request.method} {request.path}: {error.reason}"
        if isinstance(error, web.HTTPRequestEntityTooLarge):
            text = f"body: {error.text}"
        allowed = error.headers.get("Allow")  # with METHOD_NOT_ALLOWED
        return web.json_response(
            body_of(error.status, text),
            status=error.status,
            headers={"Allow": allowed} if allowed is not None else None,
        )
    except ConnectionError:
        return web.Response()  # which nobody gets: the client is gone
    except Exception as error:
        status, body, headers = describe(error)
        return web.json_response(body, status=status, headers=headers)
