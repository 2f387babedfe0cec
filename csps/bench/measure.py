"""Prompts for benches, and one request's measured life."""

import random
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from csps.checkpoint.locate import locate
from csps.checkpoint.tokenizer import load_tokenizer
from csps.core.errors import ConfigError
from csps.core.request import SamplingParams
from csps.rpc.client import SERVERS_CHOICE, AttentionChoice, Chunk, Complete, GenerationClient
from csps.v1 import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class ServerFlags:
    """How a bench starts its server."""

    model: str
    ranks: int
    threads_per_rank: int
    dtype: str
    stage_tokens: int
    extra: tuple[str, ...] = ()  # any other flags of csps serve

    def arguments(self) -> list[str]:
        return [
            *("--model", self.model, "--workers", str(self.ranks)),
            *("--threads-per-rank", str(self.threads_per_rank)),
            *("--dtype", self.dtype, "--stage-tokens", str(self.stage_tokens)),
            # Attention and layouts are the bench's to choose: ring leaves nothing to defaults. A
            # prompt that is measured again must be computed again.
            *("--log-level", "WARNING", "--strategy", "ring", "--no-prefix-cache"),
            *self.extra,
        ]


def prompt_ids(model: str, num_tokens: int, text: Path | None, seed: int) -> list[int]:
    """The first tokens of a real text, or random ones (the same for the same seed).

    ConfigError if the text cannot be read or is too short.
    """
    document = None if text is None else read_text(text)
    tokenizer = load_tokenizer(locate(model))
    if document is None:
        plain = sorted(set(range(tokenizer.vocab_size)) - tokenizer.special_ids)
        return random.Random(seed).choices(plain, k=num_tokens)
    token_ids = tokenizer.encode(document, add_special_tokens=True)
    if len(token_ids) < num_tokens:
        raise ConfigError(f"--text: {text} has {len(token_ids)} tokens, {num_tokens} are needed")
    return token_ids[:num_tokens]


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"--text: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text: {path}: not UTF-8 at byte {error.start}") from None


@dataclass(slots=True)
class Measured:
    """One request as its client saw it; times of time.monotonic."""

    sent: float
    token_ids: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    complete: Complete | None = None

    @property
    def client_ttft_s(self) -> float:
        return self.arrivals[0] - self.sent


async def request(
    client: GenerationClient,
    token_ids: Sequence[int],
    output: int,
    attention: AttentionChoice = SERVERS_CHOICE,
) -> Measured:
    """Run one greedy request of exactly `output` tokens."""
    measured = Measured(time.monotonic())
    await follow(client, token_ids, output, measured, attention)
    return measured


async def follow(
    client: GenerationClient,
    token_ids: Sequence[int],
    output: int,
    measured: Measured,
    attention: AttentionChoice = SERVERS_CHOICE,
) -> None:
    """As `request`, but `measured` can be watched while it grows."""
    sampling = SamplingParams(max_tokens=output, ignore_eos=True)
    async with aclosing(client.generate(token_ids, sampling, attention=attention)) as events:
        async for event in events:
            if isinstance(event, Chunk):
                measured.arrivals += [time.monotonic()] * len(event.token_ids)
                measured.token_ids += event.token_ids
            elif isinstance(event, Complete):
                measured.complete = event


def lane_delta(
    before: pb.GetServerInfoResponse, after: pb.GetServerInfoResponse, name: str
) -> dict[str, object]:
    """What one lane did between two readings; times and bytes summed over ranks."""
    old = next(lane for lane in before.lanes if lane.lane == name)
    new = next(lane for lane in after.lanes if lane.lane == name)
    received = zip(new.received_by_rank, old.received_by_rank, strict=True)
    by_kind = {kind: new.bytes_sent[kind] - old.bytes_sent.get(kind, 0) for kind in new.bytes_sent}
    return {
        "steps": new.steps - old.steps,
        "tokens": new.tokens - old.tokens,
        "wall_s": new.wall_s - old.wall_s,
        "compute_s": new.compute_s - old.compute_s,
        "comm_s": new.comm_s - old.comm_s,
        "exposed_comm_s": new.exposed_comm_s - old.exposed_comm_s,
        "bytes_moved": sum(by_kind.values()),
        "bytes_by_kind": by_kind,
        "received_by_rank": [now - then for now, then in received],
    }
