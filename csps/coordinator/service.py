"""csps.v1.Generation: the public gRPC service."""

from collections.abc import AsyncIterator, Sequence

import grpc

from csps.checkpoint.chat import ChatMessage
from csps.coordinator.frontend import TRACE_CONTEXT, Frontend, Piece, Prompt
from csps.coordinator.gate import Gate
from csps.coordinator.info import server_info
from csps.coordinator.live import LiveRequest, Prefilled
from csps.coordinator.outcome import attention_report, timings, usage
from csps.core.attention import AttentionParams
from csps.core.config import ServerConfig
from csps.core.errors import InvalidRequestError, UnknownRequestError
from csps.core.request import FinishReason
from csps.rpc import convert
from csps.rpc.convert_attention import ATTENTION_FROM_PROTO
from csps.v1 import generation_pb2 as pb
from csps.v1 import generation_pb2_grpc

_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}

Context = grpc.aio.ServicerContext[object, object]


class GenerationService(generation_pb2_grpc.GenerationServicer):
    """Serves as soon as the port is open; UNAVAILABLE until the gate opens."""

    def __init__(self, config: ServerConfig, gate: Gate) -> None:
        self._config = config
        self._gate = gate
        self._attention_backends: Sequence[str] = ()

    def start(self, attention_backends: Sequence[str]) -> None:
        """`attention_backends`: by rank."""
        self._attention_backends = attention_backends

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        with self._gate.admitting() as front:
            live = await self._submit(front, request, context)
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
        metadata = context.invocation_metadata() or ()
        return await front.submit(
            request.request_id,
            request.model,
            _prompt(request),
            convert.sampling_from_proto(request.sampling),
            self._attention(request.attention),
            report_heads=request.attention.report_heads,
            time_left_s=context.time_remaining(),
            trace_context={key: str(value) for key, value in metadata if key in TRACE_CONTEXT},
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
        if not self._gate.front.loop.abort(request.request_id):
            raise UnknownRequestError(f"request_id: no live request is {request.request_id!r}")
        return pb.AbortResponse()

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        model = self._gate.front.model
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
        gate = self._gate
        return server_info(gate.front, self._config, self._attention_backends, gate.uptime_s)

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        scheduler = self._gate.front.loop.scheduler
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
        usage=usage(live, num_output),
        timings=timings(live),
        attention=attention_report(live),
        prompt_logprobs=live.prompt_logprobs(),
    )
