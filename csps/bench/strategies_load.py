"""The mixed load of `bench strategies`: short chats over a stream of long documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from random import Random
from typing import NamedTuple

from csps.core.errors import ConfigError

BEGINNING = 32  # tokens; less than a KV block, so prompts that differ there share none


class Kind(StrEnum):
    """What a request stands for."""

    CHAT = "chat"
    DOCUMENT = "document"


@dataclass(frozen=True, slots=True)
class Mix:
    """What comes how often; `chat_rate` per second, lengths in tokens."""

    duration_s: float  # of arrivals
    chat_rate: float
    chat_tokens: tuple[int, int]  # shortest and longest prompt
    chat_output: int
    doc_every_s: float
    doc_tokens: tuple[int, ...]  # by turns
    doc_output: int

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(self.chat_tokens[1] + self.chat_output, max(self.doc_tokens) + self.doc_output)


class Arrival(NamedTuple):
    """A request to come, `at_s` after the first."""

    kind: Kind
    at_s: float
    num_tokens: int
    output: int


def arrivals(mix: Mix, seed: int) -> list[Arrival]:
    """In order of time; a document is the first. The same for the same seed.

    Chats are a Poisson process with prompt lengths drawn uniformly; they do not depend on the
    documents.
    """
    random = Random(f"chats {seed}")
    found = []
    at_s = random.expovariate(mix.chat_rate)
    while at_s < mix.duration_s:
        found.append(Arrival(Kind.CHAT, at_s, random.randint(*mix.chat_tokens), mix.chat_output))
        at_s += random.expovariate(mix.chat_rate)
    for index in range(ceil(mix.duration_s / mix.doc_every_s)):
        num_tokens = mix.doc_tokens[index % len(mix.doc_tokens)]
        found.append(Arrival(Kind.DOCUMENT, index * mix.doc_every_s, num_tokens, mix.doc_output))
    return sorted(found, key=lambda arrival: arrival.at_s)


def cut(token_ids: Sequence[int], nums_tokens: Sequence[int]) -> list[list[int]]:
    """Consecutive parts of a text, of these lengths: no prompt's KV is of use to another.

    ConfigError if the text repeats itself, so that two of them begin alike.
    """
    parts, start = [], 0
    for num_tokens in nums_tokens:
        parts.append(list(token_ids[start : start + num_tokens]))
        start += num_tokens
    assert start <= len(token_ids)
    if len({tuple(part[:BEGINNING]) for part in parts}) < len(parts):
        raise ConfigError(
            f"--text: repeats itself: two prompts have the same first {BEGINNING} tokens"
        )
    return parts
