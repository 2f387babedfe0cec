"""Prompts of the quality bench, and what it makes of answers."""

import math
from itertools import count
from pathlib import Path
from random import Random

import pytest

from csps.bench.cli_quality import quality
from csps.bench.quality import variants
from csps.bench.quality_prompts import (
    NEEDLE_TASKS,
    NUM_KEYS,
    Haystack,
    Source,
    needle_cases,
    read_sources,
    text_cases,
)
from csps.bench.quality_score import agreement, perplexity, summarize, wilson
from csps.core.attention import AttentionKind
from csps.core.errors import ConfigError

DENSE, CSA, DISTANCE = AttentionKind


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


def decode(token_ids: tuple[int, ...]) -> str:
    return "".join(map(chr, token_ids))


def prose(num_lines: int) -> str:
    random = Random("prose")
    numbers = count()
    return "".join(
        f"Line {next(numbers)} has {'many ' * random.randrange(9)}words. It ends here.\n"
        for _ in range(num_lines)
    )


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack([Source("one", prose(50)), Source("two", prose(300))])


@pytest.mark.parametrize("task", NEEDLE_TASKS)
@pytest.mark.parametrize("num_tokens", [600, 3000, 60_000])  # the last: the text comes round
def test_needles_are_where_they_should_be(haystack: Haystack, task: str, num_tokens: int) -> None:
    cases = list(needle_cases(task, haystack, encode, num_tokens, 5, seed=3))
    assert [case.depth for case in cases] == [0, 0.25, 0.5, 0.75, 1]
    longest_piece = 80
    for index, case in enumerate(cases):
        assert (case.task, case.tokens, case.index) == (task, num_tokens, index)
        assert num_tokens - longest_piece < len(case.token_ids) <= num_tokens
        text = decode(case.token_ids)
        assert text.count(case.answer) == 1
        assert len(case.answer) == 7
        needle = f"is: {case.answer}."
        at = text.index(needle)
        key = text[:at].rstrip().rpartition(" ")[2]
        assert text.count(f"for {key} is: ") == 1
        assert text.endswith(
            f"\n\nThe special magic number for {key} mentioned in the provided text is"
        )
        question = f"What is the special magic number for {key} mentioned in the provided text?"
        assert text.count(question) == (task == "midtext")
        assert text.count("The special magic number for ") == 1 + (
            NUM_KEYS if task == "multikey" else 1
        )
        room = (2 * longest_piece + len(question)) / len(text)
        if task == "midtext":
            middle = text.index(question) / len(text)
            assert middle == pytest.approx(0.5, abs=room)
            assert text.index(needle) < text.index(question)
            assert at / len(text) == pytest.approx(case.depth / 2, abs=2 * room)
        else:
            assert at / len(text) == pytest.approx(case.depth, abs=5 * room)


def test_the_seed_decides(haystack: Haystack) -> None:
    def made(seed: int) -> list[tuple[int, ...]]:
        return [case.token_ids for case in needle_cases("multikey", haystack, encode, 900, 4, seed)]

    assert made(1) == made(1)
    assert len({*made(1), *made(2)}) == 8


def test_too_few_tokens_for_a_needle(haystack: Haystack) -> None:
    with pytest.raises(ConfigError, match=r"^--tokens: 100 are too few"):
        next(needle_cases("needle", haystack, encode, 100, 1, seed=0))


def test_stretches_of_texts_by_turns() -> None:
    sources = [Source("one", prose(400)), Source("two", prose(100)[::-1])]
    cases = text_cases(sources, encode, 1000, 5)
    assert [case.source for case in cases] == ["one 1", "two 1", "one 2", "two 2", "one 3"]
    assert {len(case.token_ids) for case in cases} == {1000}
    assert len({case.token_ids for case in cases}) == 5
    assert decode(cases[4].token_ids).startswith("Line ")
    assert [case.source for case in text_cases(sources, encode, 1000, 2)] == ["one", "two"]
    with pytest.raises(ConfigError, match=r"^--text: two is too short for 10 stretches of 1000"):
        text_cases(sources, encode, 1000, 20)


def test_sources_are_files_or_the_library(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text("Once.")
    assert read_sources([path]) == [Source("story.txt", "Once.")]
    assert "\ndef " in read_sources([])[0].text
    with pytest.raises(ConfigError, match=r"^--text: .*none\.txt"):
        read_sources([tmp_path / "none.txt"])


def test_wilson_interval() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: method 3 for these counts.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


def test_agreement_and_perplexity() -> None:
    assert agreement([1, 2, 3, 4], [1, 2, 9, 4]) == (0.75, 2)
    assert agreement([1, 2], [1, 2]) == (1.0, 2)
    assert agreement([5, 2], [1, 2]) == (0.5, 0)
    assert perplexity([math.log(0.5), math.log(0.125)]) == pytest.approx(4.0)


def test_every_gamma_and_window_is_a_variant() -> None:
    found = variants([DISTANCE, CSA, DENSE], [0.9, 0.95], [4])
    assert [variant.name for variant in found] == ["dense", "csa-distance 4", "csa 0.9", "csa 0.95"]
    assert [variant.choice.gamma for variant in found] == [None, None, 0.9, 0.95]
    assert found[1].choice.window_blocks == 4
    assert [variant.name for variant in variants([CSA, DISTANCE], [], [])] == [
        "csa",
        "csa-distance",
    ]


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("tasks", {"tasks": "needle,pplx"}),
        ("tokens", {"tokens": "0"}),
        ("attention", {"attention": "csa"}),  # ppl needs dense beside it
        ("gamma", {"gamma": "0.9,1.5"}),
        ("gamma", {"gamma": "high"}),
        ("gamma", {"attention": "dense", "gamma": "0.9"}),
        ("window", {"window": "8"}),
        ("window", {"attention": "dense,csa-distance", "window": "0"}),
        ("window", {"attention": "dense,csa-distance", "window": "70000"}),
        ("csa-rows", {"csa_rows": 65}),
        ("csa-min-recall", {"csa_min_recall": 1.1}),
    ],
)
def test_a_wrong_flag_is_named(flag: str, values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"^--{flag}: "):
        quality(**values)


def row(task: str, variant: str, **others: object) -> dict[str, object]:
    figures = (
        "ttft_s", "received_bytes_mean", "received_bytes_max", "received_over_dense_kv_mean",
        "received_over_dense_kv_max",
    )  # fmt: skip
    numbers = dict.fromkeys(figures, 2.0)
    return {"task": task, "tokens": 10, "variant": variant, "sparse": None, **numbers, **others}


def test_rows_are_summarized_by_task_length_and_variant() -> None:
    report = dict.fromkeys(
        ("density", "union_density", "recall_mean", "recall_low", "recall_p5", "dense_share",
         "widened_share"), 0.5,
    )  # fmt: skip

    def text_row(ratio: float, equal: float) -> dict[str, object]:
        return row(
            "text", "csa", source="story", sparse=report,
            ppl={"value": 3.0, "over_dense": ratio},
            agreement={"equal": equal, "common_prefix": 7},
        )  # fmt: skip

    rows = [
        row("needle", "dense", correct=True),
        row("needle", "csa", correct=False, received_over_dense_kv_mean=None),
        row("needle", "dense", correct=False, ttft_s=4.0),
        text_row(1.0, 1.0),
        text_row(1.02, 0.5),
    ]
    dense, csa, ppl, same = summarize(rows, ["needle", "multikey", "ppl", "agreement"])
    assert (dense["correct"], dense["prompts"], dense["accuracy"]) == (1, 2, 0.5)
    assert (dense["accuracy_low"], dense["accuracy_high"]) == wilson(1, 2)
    assert dense["ttft_s"] == 3.0
    assert dense["density"] is None
    assert dense["sparse_prompts"] == 0
    assert csa["received_over_dense_kv_mean"] is None
    assert (ppl["task"], ppl["variant"], ppl["sparse_prompts"]) == ("ppl", "csa", 2)
    assert ppl["ppl_over_dense"] == pytest.approx(1.01)
    assert (ppl["ppl_over_dense_min"], ppl["ppl_over_dense_max"]) == (1.0, 1.02)
    assert ppl["ppl_over_dense_standard_error"] == pytest.approx(0.01)
    assert len(ppl["texts"]) == 2  # type: ignore[arg-type]
    assert (same["task"], same["equal"], same["common_prefix"]) == ("agreement", 0.75, 7)
    assert same["recall_mean"] == 0.5
