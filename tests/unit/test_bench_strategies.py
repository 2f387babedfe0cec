"""The load of the strategies bench, and what it makes of the answers."""

from itertools import pairwise

import pytest

from csps.bench.cli_strategies import parse_configurations, strategies
from csps.bench.strategies import FOR_TWO_CORES
from csps.bench.strategies_load import Kind, Mix, arrivals, cut
from csps.bench.strategies_score import UNFINISHED, Sample, mark_best, summarize
from csps.core.errors import ConfigError

MIX = Mix(
    duration_s=2000.0, chat_rate=0.5, chat_tokens=(64, 256), chat_output=48,
    doc_every_s=30.0, doc_tokens=(4096, 8000), doc_output=32,
)  # fmt: skip


def sample(
    kind: Kind = Kind.CHAT,
    *,
    sent_s: float = 0.0,
    ttft_s: float = 1.0,
    gaps_ms: tuple[float, ...] = (10.0, 30.0),
    tokens: int = 3,
    error: str | None = None,
) -> Sample:
    response_s = ttft_s + sum(gaps_ms) / 1e3
    return Sample(kind, sent_s, sent_s, 100, tokens, error, ttft_s, response_s, gaps_ms)


def test_documents_by_the_clock_chats_at_random() -> None:
    load = arrivals(MIX, seed=1)
    assert [arrival.at_s for arrival in load] == sorted(arrival.at_s for arrival in load)
    documents = [arrival for arrival in load if arrival.kind is Kind.DOCUMENT]
    assert [document.at_s for document in documents] == [30.0 * i for i in range(67)]
    assert [document.num_tokens for document in documents[:3]] == [4096, 8000, 4096]
    assert {document.output for document in documents} == {32}
    chats = [arrival for arrival in load if arrival.kind is Kind.CHAT]
    # A Poisson process: 1000 are expected, spread 32; gaps vary as much as they are long.
    assert 870 < len(chats) < 1130
    gaps = [later.at_s - earlier.at_s for earlier, later in pairwise(chats)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance**0.5 == pytest.approx(mean, rel=0.15)
    lengths = {chat.num_tokens for chat in chats}
    assert min(lengths) == 64
    assert max(lengths) == 256
    assert max(chat.at_s for chat in chats) < 2000.0


def test_the_seed_decides() -> None:
    assert arrivals(MIX, seed=1) == arrivals(MIX, seed=1)
    assert arrivals(MIX, seed=1) != arrivals(MIX, seed=2)
    assert MIX.longest == 8032


def test_prompts_share_no_text() -> None:
    parts = cut(range(400), [100, 50, 200])
    assert [len(part) for part in parts] == [100, 50, 200]
    assert [token for part in parts for token in part] == [*range(350)]
    with pytest.raises(ConfigError, match=r"^--text: repeats itself"):
        cut([*range(50)] * 2, [50, 50])


def test_figures_by_kind() -> None:
    samples = [
        sample(ttft_s=1.0, gaps_ms=(10.0, 30.0)),
        sample(ttft_s=3.0, gaps_ms=(20.0, 500.0), sent_s=6.48),
        sample(Kind.DOCUMENT, ttft_s=8.0, gaps_ms=(), tokens=0, error=UNFINISHED),
        sample(ttft_s=0.0, gaps_ms=(), tokens=0, error="UNAVAILABLE: gone"),
    ]
    row = summarize(samples)
    assert row["makespan_s"] == pytest.approx(10.0)
    assert row["prefill_tok_s"] == pytest.approx(20.0)  # two had a first token
    assert row["output_tok_s"] == pytest.approx(0.6)
    chat, document, both = (row["figures"][name] for name in ("chat", "document", "all"))
    assert (chat["count"], chat["failed"]) == (3, 1)
    assert chat["ttft_s"] == {"mean": 2.0, "p50": 1.0, "p99": 3.0}
    assert chat["tbt_ms"] == {"mean": 140.0, "p50": 20.0, "p99": 500.0}
    assert chat["tbt_ms_max"] == {"mean": 265.0, "p50": 30.0, "p99": 500.0}
    # What it had waited for when the drain was over counts; it has no gap.
    assert (document["count"], document["failed"]) == (1, 1)
    assert document["ttft_s"]["mean"] == 8.0
    assert document["tbt_ms"] == {"mean": None, "p50": None, "p99": None}
    assert (both["count"], both["failed"]) == (4, 2)
    assert both["ttft_s"]["mean"] == 4.0


def test_the_best_of_each_strategy() -> None:
    def row(name: str, strategy: str, *samples: Sample) -> dict[str, object]:
        return {"name": name, "strategy": strategy, **summarize(samples)}

    rows = [
        row("a", "sarathi", sample(ttft_s=2.0)),
        row("b", "sarathi", sample(ttft_s=1.5)),
        row("fast but refused", "sarathi", sample(ttft_s=0.1), sample(error="refused")),
        row("c", "shift", sample(error="refused")),
        row("d", "shift", sample(error="refused")),
    ]
    assert [row["name"] for row in mark_best(rows) if row["best"]] == ["b", "c"]
    assert len(mark_best(rows)) == 5


def test_configurations_are_names_and_flags() -> None:
    found = parse_configurations(["a b=--strategy ring --model 'x y'", "c="])
    assert [(each.name, each.flags) for each in found] == [
        ("a b", ("--strategy", "ring", "--model", "x y")),
        ("c", ()),
    ]
    names = [each.name for each in parse_configurations(FOR_TWO_CORES)]
    assert len(names) == 10
    assert {"csps-1024", "ring-1024", "sarathi-1x2-256", "sarathi-tp2-512", "shift-2048"} <= {
        *names
    }


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["--strategy ring"], "expected NAME=FLAGS"),
        (["--strategy=ring"], "expected NAME=FLAGS"),
        (["=--strategy ring"], "expected NAME=FLAGS"),
        (["a=--x", "a=--y"], "a comes twice"),
        (["a=--x 'y"], "No closing quotation"),
    ],
)
def test_configurations_that_are_none(texts: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^--config: .*{problem}"):
        parse_configurations(texts)


@pytest.mark.parametrize("words", ["256-64", "0-9", "64", "a-b", "64-256-300"])
def test_a_range_that_is_none(words: str) -> None:
    with pytest.raises(ConfigError, match=r"^--chat-tokens: expected a range"):
        strategies(chat_tokens=words)
