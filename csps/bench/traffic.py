"""`bench traffic`: bytes that every strategy moves, counted by the ranks, beside the formulas."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from csps.bench.measure import ServerFlags, request
from csps.bench.server import ServerProcess
from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.core.config import DType
from csps.rpc.client import GenerationClient
from csps.sched.volumes import Volumes


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
    volumes = Volumes(config, flags.ranks, DType(flags.dtype).element_bytes)
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
    del total["drawn"]  # tokens, for the steps that are planned ahead: of no formula
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
