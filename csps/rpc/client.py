"""An asyncio client of a server, for submit, the benches and replay."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import grpc

from csps.core.attention import AttentionKind, HeadReport
from csps.core.errors import CspsError, InvalidRequestError
from csps.core.request import FinishReason, SamplingParams
from csps.rpc import convert
from csps.rpc.auth import authorization
from csps.rpc.convert_attention import ATTENTION_FROM_PROTO, ATTENTION_TO_PROTO, head_from_proto
from csps.rpc.convert_steps import StepBatch, batch_from_proto
from csps.rpc.tls import ClientTls, open_channel, why_unreachable
from csps.v1 import admin_pb2, admin_pb2_grpc, generation_pb2_grpc
from csps.v1 import generation_pb2 as pb

_FINISH = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_ABORT: FinishReason.ABORT,
}

T = TypeVar("T")
Messages = Sequence[tuple[str, str]]  # (role, content)


class ServerError(CspsError):
    """The server answered with an error status, or did not answer at all."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Progress:
    """Prompt tokens whose KV exists; `queued` until the first step."""

    queued: bool
    prefilled_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a drawn token; `top`: (token id, its own), likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens, and text that became final. `logprobs` is empty unless asked for."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """How the prompt's prefill attends; None leaves it to the server."""

    kind: AttentionKind | None = None
    gamma: float | None = None
    window_blocks: int | None = None
    report_heads: bool = False


SERVERS_CHOICE = AttentionChoice()


@dataclass(frozen=True, slots=True)
class SparseOutcome:
    """What a sparse prefill approximated; fields as in the proto's AttentionReport."""

    kind: AttentionKind
    gamma: float
    density: float
    union_density: float
    recall_mean: float
    recall_low: float
    recall_high: float
    recall_p5: float
    recall_min: float
    num_probes: int
    dense_share: float
    widened_share: float
    heads: tuple[HeadReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Complete:
    """The end. Times in seconds since the server received the request.

    `sparse` is None if the prefill was dense. `prompt_logprobs`: natural, of the prompt's last
    tokens, as many as were asked for. `cached_tokens` of the prompt were not computed.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    queued_s: float
    first_scheduled_s: float
    first_token_s: float
    last_token_s: float
    sparse: SparseOutcome | None = None
    prompt_logprobs: tuple[float, ...] = ()
    cached_tokens: int = 0


Event = Progress | Chunk | Complete


class GenerationClient:
    """`async with GenerationClient("host:port") as client`. One channel, any number of calls.

    `api_key`: shown to the server with every call, "" for none. `tls`: None for clear text.
    """

    def __init__(self, target: str, api_key: str = "", tls: ClientTls | None = None) -> None:
        self.target = target
        self._tls = tls
        self._metadata = authorization(api_key)
        self._channel = open_channel(target, tls)
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)

    async def __aenter__(self) -> "GenerationClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def generate(
        self,
        prompt: str | Sequence[int] | Messages,
        sampling: SamplingParams,
        *,
        attention: AttentionChoice = SERVERS_CHOICE,
        request_id: str = "",
        model: str = "",
        timeout_s: float | None = None,
    ) -> AsyncIterator[Event]:
        """Stream one request. Closing the iterator early cancels it.

        Raises ServerError; InvalidRequestError if the request does not fit its message, such
        as a number beyond its type or text with a lone surrogate.
        """
        try:
            request = pb.GenerateRequest(
                request_id=request_id,
                model=model,
                sampling=convert.sampling_to_proto(sampling),
                attention=_attention(attention),
            )
            _set_prompt(request, prompt)
        except ValueError as error:
            raise InvalidRequestError("request", f"cannot be sent: {error}") from None
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        async with contextlib.aclosing(self._responses(call)) as responses:
            async for response in responses:
                yield _event(response)

    async def watch_steps(self, max_queued: int = 0) -> AsyncIterator[StepBatch]:
        """Every step from the first batch on, which comes at once and is empty.

        Ends when the server stops; raises ServerError. `max_queued`: see WatchStepsRequest.
        """
        request = admin_pb2.WatchStepsRequest(max_queued=max_queued)
        call = self._admin.WatchSteps(request, metadata=self._metadata)
        async with contextlib.aclosing(self._responses(call)) as responses:
            async for response in responses:
                yield batch_from_proto(response)

    async def _responses(self, call: Any) -> AsyncGenerator[Any, None]:
        """What the server streams; ServerError if it ends with an error. Closing it cancels."""
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None
        except asyncio.CancelledError:
            # grpc.aio raises this also when the server answers CANCELLED and nobody here did.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ServerError("CANCELLED", await call.details() or "by the server") from None
        finally:
            call.cancel()

    async def abort(self, request_id: str) -> None:
        """End a live request. ServerError (NOT_FOUND) if there is none."""
        await self._unary(self._stub.Abort, pb.AbortRequest(request_id=request_id))

    async def model_info(self, timeout_s: float | None = None) -> pb.GetModelInfoResponse:
        request = pb.GetModelInfoRequest()
        return await self._unary(self._stub.GetModelInfo, request, timeout_s)

    async def server_info(self) -> pb.GetServerInfoResponse:
        return await self._unary(self._stub.GetServerInfo, pb.GetServerInfoRequest())

    async def load(self) -> pb.GetLoadResponse:
        return await self._unary(self._stub.GetLoad, pb.GetLoadRequest())

    async def _unary(
        self, method: Callable[..., Awaitable[T]], request: Any, timeout_s: float | None = None
    ) -> T:
        try:
            return await method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None

    def _error(self, error: grpc.aio.AioRpcError) -> ServerError:
        details = error.details() or ""
        if error.code() is grpc.StatusCode.UNAVAILABLE and "connect to" in details:
            details = why_unreachable(details, self.target, self._tls)
        elif error.code() is grpc.StatusCode.UNAVAILABLE and "ocket closed" in details:
            details = f"the connection to {self.target} was lost ({details})"
        return ServerError(error.code().name, details)


def _set_prompt(request: pb.GenerateRequest, prompt: str | Sequence[int] | Messages) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], tuple):
        for role, content in prompt:  # type: ignore[misc]
            request.messages.messages.add(role=role, content=content)
    else:
        request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
        request.token_ids.SetInParent()


def _attention(choice: AttentionChoice) -> pb.AttentionParams:
    message = pb.AttentionParams(
        gamma=choice.gamma, window_blocks=choice.window_blocks, report_heads=choice.report_heads
    )
    if choice.kind is not None:
        message.kind = ATTENTION_TO_PROTO[choice.kind]
    return message


def _sparse(report: pb.AttentionReport) -> SparseOutcome:
    return SparseOutcome(
        kind=ATTENTION_FROM_PROTO[report.kind],
        gamma=report.gamma,
        density=report.density,
        union_density=report.union_density,
        recall_mean=report.recall_mean,
        recall_low=report.recall_low,
        recall_high=report.recall_high,
        recall_p5=report.recall_p5,
        recall_min=report.recall_min,
        num_probes=report.num_probes,
        dense_share=report.dense_share,
        widened_share=report.widened_share,
        heads=tuple(head_from_proto(head) for head in report.heads),
    )


def _event(response: pb.GenerateResponse) -> Event:
    kind = response.WhichOneof("event")
    if kind == "progress":
        progress = response.progress
        return Progress(progress.queued, progress.prefilled_tokens, progress.total_tokens)
    if kind == "chunk":
        chunk = response.chunk
        logprobs = tuple(
            TokenLogprob(entry.logprob, tuple((top.token_id, top.logprob) for top in entry.top))
            for entry in chunk.logprobs
        )
        return Chunk(tuple(chunk.token_ids), chunk.text, logprobs)
    complete = response.complete
    timings = complete.timings
    return Complete(
        finish_reason=_FINISH[complete.finish_reason],
        prompt_tokens=complete.usage.prompt_tokens,
        output_tokens=complete.usage.output_tokens,
        queued_s=timings.queued_s,
        first_scheduled_s=timings.first_scheduled_s,
        first_token_s=timings.first_token_s,
        last_token_s=timings.last_token_s,
        sparse=_sparse(complete.attention) if complete.HasField("attention") else None,
        prompt_logprobs=tuple(complete.prompt_logprobs),
        cached_tokens=complete.usage.cached_tokens,
    )
