"""csps.v1.Generation: the public gRPC service."""

import time
from collections.abc import AsyncIterator, Sequence

import grpc

from csps.checkpoint.chat import ChatMessage
from csps.coordinator.frontend import Frontend, Piece, Prompt, elapsed
from csps.coordinator.info import server_info
from csps.coordinator.live import LiveRequest, Prefilled
from csps.core.attention import AttentionParams
from csps.core.config import ServerConfig
from csps.core.errors import CspsError, InvalidRequestError, UnavailableError, UnknownRequestError
from csps.core.request import FinishReason
from csps.rpc import convert
from csps.rpc.convert_attention import ATTENTION_FROM_PROTO, ATTENTION_TO_PROTO
from csps.v1 import generation_pb2 as pb
from csps.v1 import generation_pb2_grpc

_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}

# https://www.w3.org/TR/trace-context/
_TRACE_CONTEXT = ("traceparent", "tracestate")

Context = grpc.aio.ServicerContext[object, object]


class GenerationService(generation_pb2_grpc.GenerationServicer):
    """Serves as soon as the port is open; UNAVAILABLE until `start` gives it a frontend."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._frontend: Frontend | None = None
        self._attention_backends: Sequence[str] = ()
        self._stopping = False
        self._started = 0.0

    def start(self, frontend: Frontend, attention_backends: Sequence[str]) -> None:
        """`attention_backends`: by rank."""
        self._frontend = frontend
        self._attention_backends = attention_backends
        self._started = time.monotonic()

    def stop(self) -> None:
        """Refuse new prompts from now on; those that are live may end."""
        self._stopping = True

    @property
    def _front(self) -> Frontend:
        if self._frontend is None:
            raise UnavailableError("the server is starting")
        return self._frontend

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        front = self._front
        try:
            live = await self._submit(front, request, context)
        except CspsError as error:
            front.loop.refused(error)
            raise
        # However the call ends: gRPC drops this generator where it stands when the client goes
        # while a response is being sent, which may be before `stream` has begun.
        context.add_done_callback(lambda _: front.loop.close(live))  # type: ignore[arg-type]
        total = len(live.seq.prompt_ids)
        num_output = 0
        yield _response(live, progress=pb.Progress(queued=True, total_tokens=total))
        async for event in front.stream(live):
            if isinstance(event, Prefilled):
                done = min(event.num_tokens, total)
                progress = pb.Progress(prefilled_tokens=done, total_tokens=total)
                yield _response(live, progress=progress)
            elif isinstance(event, Piece):
                num_output += len(event.tokens)
                if event.tokens or event.text:
                    yield _response(live, chunk=_chunk(event))
            else:
                yield _response(live, complete=_complete(live, event, num_output))

    async def _submit(
        self, front: Frontend, request: pb.GenerateRequest, context: Context
    ) -> LiveRequest:
        if self._stopping:
            raise UnavailableError("the server is stopping")
        metadata = context.invocation_metadata() or ()
        return await front.submit(
            request.request_id,
            request.model,
            _prompt(request),
            convert.sampling_from_proto(request.sampling),
            self._attention(request.attention),
            report_heads=request.attention.report_heads,
            time_left_s=context.time_remaining(),
            trace_context={key: str(value) for key, value in metadata if key in _TRACE_CONTEXT},
        )

    def _attention(self, message: pb.AttentionParams) -> AttentionParams:
        """The request's choice; what it leaves open is the server's."""
        default = self._config.attention
        if message.kind not in (pb.ATTENTION_KIND_UNSPECIFIED, *ATTENTION_FROM_PROTO):
            raise InvalidRequestError("attention.kind", f"{message.kind} is not an AttentionKind")
        return AttentionParams(
            kind=ATTENTION_FROM_PROTO.get(message.kind, default.kind),
            gamma=message.gamma if message.HasField("gamma") else default.gamma,
            window_blocks=message.window_blocks
            if message.HasField("window_blocks")
            else default.window_blocks,
        )

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        if not self._front.loop.abort(request.request_id):
            raise UnknownRequestError(f"request_id: no live request is {request.request_id!r}")
        return pb.AbortResponse()

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        model = self._front.model
        return pb.GetModelInfoResponse(
            model=model.name,
            architecture=model.config.architecture,
            vocab_size=model.config.vocab_size,
            max_model_len=model.max_model_len,
            eos_token_ids=model.config.eos_token_ids,
            has_chat_template=model.has_chat_template,
            num_parameters=model.config.num_parameters(),
            dtype=self._config.setup.dtype.value,
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        uptime_s = time.monotonic() - self._started
        return server_info(self._front, self._config, self._attention_backends, uptime_s)

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        scheduler = self._front.loop.scheduler
        return pb.GetLoadResponse(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_prefilling + scheduler.num_running,
            queued_tokens=scheduler.num_waiting_tokens,
            kv_usage=scheduler.kv_usage,
        )


def _prompt(request: pb.GenerateRequest) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return request.text
    if kind == "token_ids":
        return request.token_ids.ids  # not copied: it may be far too long
    if kind == "messages":
        if not request.messages.messages:
            raise InvalidRequestError("messages", "is empty; at least one message is needed")
        return [ChatMessage(m.role, m.content) for m in request.messages.messages]
    raise InvalidRequestError("prompt", "one of text, token_ids and messages must be set")


def _response(
    live: LiveRequest,
    *,
    progress: pb.Progress | None = None,
    chunk: pb.Chunk | None = None,
    complete: pb.Complete | None = None,
) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        request_id=live.request_id, progress=progress, chunk=chunk, complete=complete
    )


def _chunk(piece: Piece) -> pb.Chunk:
    return pb.Chunk(
        token_ids=[token.token_id for token in piece.tokens],
        text=piece.text,
        logprobs=[
            pb.TokenLogprob(logprob=token.logprob, top=convert.top_tokens_to_proto(token))
            for token in piece.tokens
            if token.logprob is not None
        ],
    )


def _complete(live: LiveRequest, finish: FinishReason, num_output: int) -> pb.Complete:
    return pb.Complete(
        finish_reason=_FINISH[finish],
        usage=pb.Usage(
            prompt_tokens=len(live.seq.prompt_ids),
            output_tokens=num_output,
            cached_tokens=live.seq.num_cached or 0,
        ),
        timings=pb.Timings(
            queued_s=elapsed(live, live.queued),
            first_scheduled_s=elapsed(live, live.first_scheduled),
            first_token_s=elapsed(live, live.first_token),
            last_token_s=elapsed(live, live.last_token),
        ),
        attention=_attention_report(live),
        prompt_logprobs=live.prompt_logprobs(),
    )


def _attention_report(live: LiveRequest) -> pb.AttentionReport | None:
    params = live.seq.attention
    if not params.is_sparse or not live.sparse.causal_pairs:
        return None
    report = live.sparse.to_proto()
    report.kind = ATTENTION_TO_PROTO[params.kind]
    report.gamma = params.gamma
    return report
