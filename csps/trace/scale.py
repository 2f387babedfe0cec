"""A trace made smaller, faster or shorter, such that what its prompts share stays shared."""

from dataclasses import dataclass, fields, replace
from hashlib import sha256

from csps.core.errors import ConfigError
from csps.trace.schema import Trace, TraceRequest


@dataclass(frozen=True, slots=True)
class Scaling:
    """What to do, in this order; the default is nothing.

    `from_s`, `to_s`: keep the sessions that begin in [from_s, to_s), and with `cut` the requests
    that arrive in it, whatever their session; time then counts from `from_s`. `one_in` K: keep
    the sessions with sha256(session) mod K = 0. `max_requests`: the first so many. `divide` K:
    lengths and blocks by K, lengths rounded up; `divide_output`: another K for the output.
    `max_prompt`: cut longer prompts there, counted after division. `speed`: arrivals so many
    times as fast.
    """

    from_s: float = 0.0
    to_s: float | None = None
    cut: bool = False
    one_in: int = 1
    max_requests: int | None = None
    divide: int = 1
    divide_output: int | None = None
    max_prompt: int | None = None
    speed: float = 1.0


def scale(trace: Trace, scaling: Scaling) -> Trace:
    """ConfigError if a value makes no sense, or if no request is left."""
    _check(trace, scaling)
    block_tokens = trace.block_tokens // scaling.divide
    kept = _slice(trace.requests, scaling)
    kept = [request for request in kept if _chosen(request.session, scaling.one_in)]
    if not kept:
        raise ConfigError("--from, --to, --one-in: leave no request")
    requests = (_scaled(r, scaling, block_tokens) for r in kept[: scaling.max_requests])
    how = _how(scaling)
    return Trace(
        name=trace.name,
        source=f"{trace.source}; csps trace scale {how}" if how else trace.source,
        block_tokens=block_tokens,
        requests=tuple(requests),
    )


def _slice(requests: tuple[TraceRequest, ...], scaling: Scaling) -> list[TraceRequest]:
    to_s = float("inf") if scaling.to_s is None else scaling.to_s
    inside = [scaling.from_s <= request.arrival_s < to_s for request in requests]
    if not scaling.cut:
        begins: dict[int, bool] = {}  # whether the session's first request is inside
        inside = [
            begins.setdefault(request.session, here)
            for request, here in zip(requests, inside, strict=True)
        ]
    return [request for request, here in zip(requests, inside, strict=True) if here]


def _chosen(session: int, one_in: int) -> bool:
    return one_in == 1 or int(sha256(str(session).encode()).hexdigest(), 16) % one_in == 0


def _scaled(request: TraceRequest, scaling: Scaling, block_tokens: int) -> TraceRequest:
    prompt_tokens = -(-request.prompt_tokens // scaling.divide)
    if scaling.max_prompt is not None:
        prompt_tokens = min(prompt_tokens, scaling.max_prompt)
    return replace(
        request,
        arrival_s=round((request.arrival_s - scaling.from_s) / scaling.speed, 6),
        prompt_tokens=prompt_tokens,
        output_tokens=-(-request.output_tokens // (scaling.divide_output or scaling.divide)),
        # Uncut, all of them: rounding up twice, by K and by B / K, is rounding up by B.
        blocks=request.blocks[: -(-prompt_tokens // block_tokens)],
    )


def _how(scaling: Scaling) -> str:
    """As the flags of csps trace scale."""
    words = []
    for field in fields(Scaling):
        value = getattr(scaling, field.name)
        if value != field.default:
            flag = "--" + field.name.removesuffix("_s").replace("_", "-")
            words.append(flag if value is True else f"{flag} {value:g}")
    return " ".join(words)


def _check(trace: Trace, scaling: Scaling) -> None:
    for flag, value in (
        ("--divide", scaling.divide),
        ("--divide-output", scaling.divide_output),
        ("--one-in", scaling.one_in),
        ("--max-requests", scaling.max_requests),
        ("--max-prompt", scaling.max_prompt),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{flag}: expected at least 1, got {value}")
    if trace.block_tokens % scaling.divide:
        raise ConfigError(
            f"--divide: expected a divisor of the trace's block size, {trace.block_tokens} "
            f"tokens, got {scaling.divide}"
        )
    if not 0 < scaling.speed < float("inf"):
        raise ConfigError(f"--speed: expected a number above 0, got {scaling.speed}")
    if not 0 <= scaling.from_s < (float("inf") if scaling.to_s is None else scaling.to_s):
        raise ConfigError(
            f"--from, --to: expected 0 <= from < to, got {scaling.from_s}, {scaling.to_s}"
        )
