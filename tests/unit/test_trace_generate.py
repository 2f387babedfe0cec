"""Generated traces: the same for the same seed, valid, and as their profile says."""

import shlex
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from csps.cli import app
from csps.core.errors import ConfigError
from csps.trace.arrivals import ArrivalKind, Arrivals, arrival_times
from csps.trace.generate import generate
from csps.trace.profiles import PROFILES, ProfileName
from csps.trace.schema import read_trace, write_trace
from csps.trace.stats import trace_stats
from tests.unit.traces import AT_ANY_SPEED, num_shared

TRACES = Path(__file__).parents[2] / "traces"


@settings(AT_ANY_SPEED, max_examples=20)
@given(st.sampled_from(ProfileName), st.integers(0, 2**32), st.sampled_from(ArrivalKind))
def test_the_same_seed_gives_the_same_valid_trace(
    tmp_path_factory: pytest.TempPathFactory, name: ProfileName, seed: int, kind: ArrivalKind
) -> None:
    folder = tmp_path_factory.mktemp("traces")
    made = [generate(name, seed, 2.0, Arrivals(kind), requests=60) for _ in range(2)]
    for index, trace in enumerate(made):
        write_trace(folder / str(index), trace)
    assert (folder / "0").read_bytes() == (folder / "1").read_bytes()
    assert read_trace(folder / "0") == (made[0], [])
    assert generate(name, seed + 1, 2.0, Arrivals(kind), requests=60) != made[0]


@pytest.mark.parametrize("sample", ["chat_long_small.jsonl", "doc_qa_small.jsonl"])
def test_committed_samples_are_what_their_commands_make(sample: str, tmp_path: Path) -> None:
    """The commands of traces/README.md, run elsewhere."""
    lines = (TRACES / "README.md").read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if f"--out traces/{sample}" in line)
    for line in lines[end - 1 : end + 1]:
        words = [
            str(tmp_path / Path(word).name) if word.startswith(("out/", "traces/")) else word
            for word in shlex.split(line)
        ]
        assert words[:2] == ["csps", "trace"]
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, done.output
    assert (tmp_path / sample).read_bytes() == (TRACES / sample).read_bytes()


@pytest.mark.parametrize("name", ProfileName)
def test_sessions_have_as_many_turns_as_the_profile_says(name: ProfileName) -> None:
    rng, profile = Random(5), PROFILES[name]
    turns = [len(tuple(profile.sessions.draw(rng))) for _ in range(20_000)]
    assert fmean(turns) == pytest.approx(profile.turns, rel=0.03)


def test_turns_of_a_conversation_keep_what_was_said() -> None:
    trace = generate(ProfileName.CHAT_LONG, seed=3, requests=3000)
    assert all(request.blocks[0] == 0 for request in trace.requests)  # the system prompt
    latest = {}
    whole = followed = 0
    for request in trace.requests:
        before = latest.get(request.session)
        if before:
            assert request.turn == before.turn + 1
            assert request.prompt_tokens > before.prompt_tokens + before.output_tokens
            shared = num_shared(before, request)
            assert shared <= before.prompt_tokens // 512
            followed += 1
            whole += shared == before.prompt_tokens // 512
        latest[request.session] = request
    assert 0.80 < whole / followed < 0.95  # 85%, and branches near the end of their prompt
    owners: dict[int, int] = {}
    for request in trace.requests:
        for block in request.blocks[1:]:
            assert owners.setdefault(block, request.session) == request.session


def test_questions_share_their_document_and_other_profiles_nothing() -> None:
    docs = generate(ProfileName.DOC_QA, seed=1, rate=0.2, requests=2000)
    by_session: dict[int, list[int]] = {}
    for request in docs.requests:
        by_session.setdefault(request.session, []).append(request.prompt_tokens)
    assert all(len(set(lengths)) == 1 for lengths in by_session.values())
    assert trace_stats(docs).prefix_hit > 0.6
    assert trace_stats(generate(ProfileName.REASON_LONG, requests=500)).prefix_hit == 0
    assert trace_stats(generate(ProfileName.API_HEAVY_TAIL, requests=500)).prefix_hit == 0


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [
        (Arrivals(ArrivalKind.POISSON), 1.0),
        (Arrivals(ArrivalKind.GAMMA, cv=3.2), 3.2),
        (Arrivals(ArrivalKind.GAMMA, cv=0.5), 0.5),
    ],
)
def test_arrivals_have_their_rate_and_burstiness(arrivals: Arrivals, cv: float) -> None:
    times = list(islice(arrival_times(arrivals, 2.0, Random(1)), 50_000))
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) >= 0
    assert 1 / fmean(gaps) == pytest.approx(2.0, rel=0.06)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.06)


def test_on_off_arrivals_come_in_bursts() -> None:
    arrivals = Arrivals(ArrivalKind.ON_OFF, on_s=17, off_s=43)
    times = list(islice(arrival_times(arrivals, 2.55, Random(1)), 300_000))
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) > 0
    assert 1 / fmean(gaps) == pytest.approx(2.55, rel=0.1)
    within = [gap for gap in gaps if gap < 2]
    assert 1 / fmean(within) == pytest.approx(9.0, rel=0.06)  # 2.55 * 60 / 17
    assert pstdev(gaps) / fmean(gaps) > 5


def test_a_trace_ends_where_it_is_told() -> None:
    by_number = generate(ProfileName.CHAT_LONG, requests=50)
    last_s = by_number.requests[-1].arrival_s
    by_time = generate(ProfileName.CHAT_LONG, duration_s=last_s + 1e-6)
    assert by_time.requests == by_number.requests
    both = generate(ProfileName.CHAT_LONG, requests=10, duration_s=last_s)
    assert both.requests == by_number.requests[:10]
    assert both.source.endswith(f"--requests 10 --duration {last_s:g}")


def test_what_cannot_be_generated() -> None:
    for values, text in (
        ({}, "--requests or --duration"),
        ({"requests": 0}, "--requests: expected at least 1"),
        ({"requests": 1, "rate": 0.0}, "--rate: expected a number above 0"),
        ({"requests": 1, "arrivals": Arrivals(cv=float("nan"))}, "--cv: expected"),
        ({"requests": 1, "arrivals": Arrivals(on_s=-1)}, "--on: expected"),
        ({"duration_s": 1e-9}, "--duration: nothing arrives"),
    ):
        with pytest.raises(ConfigError) as caught:
            generate(ProfileName.CHAT_LONG, **values)  # type: ignore[arg-type]
        assert text in str(caught.value)
