"""Prompts whose answers show what a prefill lost, and the texts they are made of.

Needles are sentences with a number, hidden in a text (RULER, arXiv 2404.06654: single and
multi-key retrieval); the answer is primed, so that greedy tokens are enough to judge it. A
prompt's last tile of queries is exact even in sparse prefill, so midtext asks in the middle: its
end only begins the answer.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

from csps.bench.corpus import CHARS_PER_TOKEN, library_source
from csps.bench.measure import read_text
from csps.core.errors import ConfigError

NEEDLE_TASKS = ("needle", "multikey", "midtext")
NUM_KEYS = 4  # of multikey
MIDDLE = 0.5  # where midtext asks
LIBRARY_CHARS = 4_000_000

INTRO = "Some special magic numbers are hidden in the text below. Remember them.\n\n"
NEEDLE = "The special magic number for {key} is: {number}."
QUESTION = "What is the special magic number for {key} mentioned in the provided text?"
PRIMED = "The special magic number for {key} mentioned in the provided text is"

ADJECTIVES = (
    "amber", "brave", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly",
    "keen", "lively", "misty", "noble", "odd", "proud", "quiet", "rusty", "silent", "tidy",
    "upper", "vivid", "windy", "young",
)  # fmt: skip
NOUNS = (
    "anchor", "basket", "candle", "desert", "engine", "falcon", "garden", "harbor", "island",
    "jacket", "kettle", "ladder", "magnet", "needle", "orchard", "pepper", "quarry", "river",
    "saddle", "tunnel", "valley", "willow",
)  # fmt: skip

# A needle may stand behind a line or a sentence.
_PIECE_END = re.compile(r"(?<=\n)|(?<=[.!?] )")

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Source:
    """A text and what it is called in reports."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt of a task. `answer`: what the output must hold, empty if it is not asked.

    `depth` of the asked needle: 0 the text's begin, 1 its end (of midtext: the question).
    """

    task: str
    tokens: int  # as asked for
    index: int
    token_ids: tuple[int, ...]
    answer: str = ""
    depth: float = 0.0
    source: str = ""


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """The files, or Python's standard library. ConfigError if one cannot be read."""
    if not paths:
        return [Source("Python standard library", library_source(LIBRARY_CHARS))]
    return [Source(path.name, read_text(path)) for path in paths]


class Haystack:
    """The sources behind one another, as pieces between which a needle can stand."""

    def __init__(self, sources: Sequence[Source]) -> None:
        text = "".join(source.text.rstrip("\n") + "\n" for source in sources)
        self._pieces = [piece for piece in _PIECE_END.split(text) if piece]

    def pieces(self, start: int, num_chars: int) -> list[str]:
        """From a piece on, `num_chars` characters and more; a short text comes round again."""
        chosen: list[str] = []
        length = 0
        while length < num_chars:
            chosen.append(self._pieces[(start + len(chosen)) % len(self._pieces)])
            length += len(chosen[-1])
        return chosen

    def __len__(self) -> int:
        return len(self._pieces)


def needle_cases(
    task: str, haystack: Haystack, encode: Encode, num_tokens: int, count: int, seed: int
) -> Iterator[Case]:
    """`count` prompts of at most `num_tokens` tokens, less than a piece shorter.

    The asked needle goes from the begin of the text to its end; all else is drawn from `seed`.
    ConfigError if needles and question alone are longer than that.
    """
    for index in range(count):
        depth = index / max(count - 1, 1)
        random = Random(f"{seed} {task} {num_tokens} {index}")
        start = random.randrange(len(haystack))
        pieces = haystack.pieces(start, num_tokens * CHARS_PER_TOKEN)
        parts = _Parts(random, task, depth)
        text = _longest(parts, pieces, encode, num_tokens)
        yield Case(task, num_tokens, index, tuple(encode(text)), parts.answer, depth)


class _Parts:
    """What is put into a haystack, and where: depths are shares of its characters."""

    def __init__(self, random: Random, task: str, depth: float) -> None:
        num_keys = NUM_KEYS if task == "multikey" else 1
        keys = random.sample([f"{a}-{n}" for a in ADJECTIVES for n in NOUNS], num_keys)
        numbers = random.sample(range(1_000_000, 10_000_000), num_keys)
        self.answer = str(numbers[0])
        self._end = PRIMED.format(key=keys[0])
        depths = [depth, *(random.random() for _ in keys[1:])]
        self._inserts = [
            (at, NEEDLE.format(key=key, number=number))
            for at, key, number in zip(depths, keys, numbers, strict=True)
        ]
        if task == "midtext":
            self._inserts = [(at * MIDDLE, sentence) for at, sentence in self._inserts]
            self._inserts.append((MIDDLE, QUESTION.format(key=keys[0])))

    def text(self, pieces: Sequence[str]) -> str:
        """The prompt. Inserted sentences end as the piece before them does."""
        whole = list(pieces)
        ends = list(accumulate(map(len, pieces)))
        # From behind, so that what is inserted does not move what is left to insert; of equal
        # places the later insert must come second.
        for depth, sentence in sorted(self._inserts, key=lambda insert: insert[0])[::-1]:
            at = bisect_left(ends, depth * ends[-1]) + 1 if depth > 0 else 0
            whole.insert(at, sentence + (pieces[at - 1][-1] if at else "\n"))
        newline = "" if whole[-1].endswith("\n") else "\n"
        return INTRO + "".join(whole) + newline + "\n" + self._end


def _longest(parts: _Parts, pieces: Sequence[str], encode: Encode, num_tokens: int) -> str:
    """The prompt with as many pieces as `num_tokens` allow. ConfigError if not one fits."""

    def encoded_length(num_pieces: int) -> int:
        return len(encode(parts.text(pieces[:num_pieces])))

    num_fitting = bisect_right(range(1, len(pieces) + 1), num_tokens, key=encoded_length)
    if num_fitting == 0:
        raise ConfigError(f"--tokens: {num_tokens} are too few for a needle and its question")
    return parts.text(pieces[:num_fitting])


def text_cases(
    sources: Sequence[Source], encode: Encode, num_tokens: int, count: int
) -> list[Case]:
    """`count` stretches of exactly `num_tokens` tokens, by turns of the sources.

    A source is cut into as many equal shares as it must give; each stretch begins one.
    ConfigError if a share is too short.
    """
    cases = []
    for index in range(count):
        turn, which = divmod(index, len(sources))
        source = sources[which]
        num_shares = len(range(which, count, len(sources)))
        size = len(source.text) // num_shares
        begin = source.text.rfind("\n", 0, turn * size) + 1
        token_ids = encode(source.text[begin : begin + min(size, num_tokens * CHARS_PER_TOKEN)])
        if len(token_ids) < num_tokens:
            raise ConfigError(
                f"--text: {source.name} is too short for {num_shares} stretches of {num_tokens} "
                "tokens; give more texts, or fewer --texts"
            )
        name = f"{source.name} {turn + 1}" if num_shares > 1 else source.name
        cases.append(Case("text", num_tokens, index, tuple(token_ids[:num_tokens]), source=name))
    return cases
