"""`bench traffic`: bytes that every strategy moves, counted by the ranks, beside the formulas."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from csps.bench.measure import ServerFlags, request
from csps.bench.server import ServerProcess
from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.core.heads import all_heads
from csps.core.model_config import ModelConfig
from csps.rpc.client import GenerationClient


@dataclass(frozen=True, slots=True)
class Volumes:
    """Bytes of one layer, all ranks together; `num_tokens` is of a prompt, or 1 when decoding.

    There are at most as many ranks as KV heads, or each rank's copy of k and v would count besides.
    """

    config: ModelConfig
    num_ranks: int
    element_bytes: int

    @property
    def query(self) -> int:
        return self.config.num_heads * self.config.head_dim * self.element_bytes

    @property
    def kv(self) -> int:
        return 2 * self.config.num_kv_heads * self.config.head_dim * self.element_bytes

    def ring(self, num_tokens: int) -> int:
        """Every shard to every other rank: (P - 1) S k."""
        return (self.num_ranks - 1) * num_tokens * self.kv

    def ship(self, num_tokens: int) -> int:
        """Queries there, (o, lse) back: (P - 1)(2 q + 4 Hq) per token."""
        return (self.num_ranks - 1) * num_tokens * (2 * self.query + 4 * self.config.num_heads)

    def all_reduces(self, num_tokens: int) -> int:
        """Two, of 2 (P - 1)/P E e per rank and token."""
        hidden = self.config.hidden_size * self.element_bytes
        return 4 * (self.num_ranks - 1) * num_tokens * hidden

    def ulysses(self, num_tokens: int) -> int:
        """All-to-all of q, k, v and one of o: f (S/P)(2 q + k) per rank, if heads are even.

        Whatever they are: each rank's rows times the others' heads.
        """
        size, config = self.num_ranks, self.config
        parts = all_heads(config.num_heads, config.num_kv_heads).split(size)
        head = config.head_dim * self.element_bytes
        weights = [2 * (part.num_heads + part.num_kv_heads) * head for part in parts]
        bounds = [rank * num_tokens // size for rank in range(size + 1)]
        return sum(
            (stop - start) * (sum(weights) - own)
            for (start, stop), own in zip(pairwise(bounds), weights, strict=True)
        )

    def helix(self, num_tokens: int) -> int:
        """q, k, v of everyone's heads to all; (o, lse) to the heads' ranks; two all-reduces."""
        others = (self.num_ranks - 1) * num_tokens
        attention = others * (2 * self.query + self.kv + 4 * self.config.num_heads)
        return attention + self.all_reduces(num_tokens)

    def logits(self) -> int:
        """Of one sampled row, in all: parts of the vocabulary in fp32 to one rank."""
        return (self.num_ranks - 1) * -(-self.config.vocab_size // self.num_ranks) * 4


class Case(NamedTuple):
    """One way to serve. Formulas give bytes of one layer; `gathers`: logits are in parts."""

    name: str
    flags: tuple[str, ...]
    prefill: Callable[[Volumes, int], int]
    decode: Callable[[Volumes, int], int]
    gathers_prefill: bool = False
    gathers_decode: bool = False


_DENSE = ("--attention", "dense")
CASES = (
    Case("ring", ("--strategy", "ring"), Volumes.ring, Volumes.ship),
    Case(
        "csps, decode SP",
        ("--strategy", "csps", "--layout", "sp", *_DENSE),
        Volumes.ring,
        Volumes.ship,
    ),
    Case(
        "csps, decode TP",
        ("--strategy", "csps", "--layout", "tp", *_DENSE),
        Volumes.ring,
        Volumes.helix,
        gathers_decode=True,
    ),
    Case(
        "sarathi",
        ("--strategy", "sarathi", "--token-budget", "65536"),
        Volumes.all_reduces,
        Volumes.all_reduces,
        gathers_prefill=True,
        gathers_decode=True,
    ),
    Case(
        "shift SP",
        ("--strategy", "shift", "--layout", "sp", "--token-budget", "65536"),
        Volumes.ulysses,
        Volumes.ulysses,
    ),
    Case(
        "shift TP",
        ("--strategy", "shift", "--layout", "tp", "--token-budget", "65536"),
        Volumes.all_reduces,
        Volumes.all_reduces,
        gathers_prefill=True,
        gathers_decode=True,
    ),
)


async def traffic(flags: ServerFlags, prompt: list[int], output: int) -> list[dict[str, object]]:
    """For each case two rows: bytes of the prompt's prefill, and of `output` tokens' decode."""
    config = read_config(locate(flags.model))
    volumes = Volumes(config, flags.ranks, 4 if flags.dtype == "float32" else 2)
    rows: list[dict[str, object]] = []
    for case in CASES:
        with ServerProcess(*flags.arguments(), *case.flags) as server:
            async with GenerationClient(server.target) as client:
                prefilled = await _moved(client, prompt, 1)
                decoded = await _moved(client, prompt, 1 + output) - prefilled
        layers, logits = config.num_layers, volumes.logits()
        expected = layers * case.prefill(volumes, len(prompt)) + case.gathers_prefill * logits
        rows.append(_row(case, "prefill", len(prompt), prefilled, expected))
        per_token = layers * case.decode(volumes, 1) + case.gathers_decode * logits
        rows.append(_row(case, "decode", output, decoded, output * per_token))
    return rows


async def _moved(client: GenerationClient, prompt: list[int], output: int) -> Counter[str]:
    """Bytes by kind that one request made all ranks send."""
    before = await _sent(client)
    await request(client, prompt, output)
    return await _sent(client) - before


async def _sent(client: GenerationClient) -> Counter[str]:
    total: Counter[str] = Counter()
    for lane in (await client.server_info()).lanes:
        total.update(lane.bytes_sent)
    return total


def _row(
    case: Case, phase: str, num_tokens: int, counted: Counter[str], expected: int
) -> dict[str, object]:
    total = sum(counted.values())
    return {
        "case": case.name,
        "phase": phase,
        "tokens": num_tokens,
        "counted": total,
        "formula": expected,
        "ratio": total / expected if expected else None,
        "by_kind": dict(counted),
    }
