"""Log-probabilities of prompt tokens: N ranks against transformers on one."""

from pathlib import Path

import pytest
import torch
import transformers

from csps.core.plan import Layout
from csps.core.request import SamplingParams
from csps.core.strategy import Placement
from tests.checkpoints import write_tiny
from tests.dist.ranks import Job, Outcome, Request, run_ranks, serve

LENGTHS = (2, 5, 16, 17, 64, 65, 150, 333)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


def prompt(num_tokens: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(num_tokens)
    return tuple(torch.randint(3, 160, (num_tokens,), generator=generator).tolist())


def expected(model: Path, token_ids: tuple[int, ...]) -> list[float]:
    """Of every token but the first."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        logits = reference.eval()(torch.tensor([token_ids])).logits[0].double()
    logprobs = logits.log_softmax(-1)[:-1]
    return logprobs.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()


def scores(outcomes: list[Outcome], num_requests: int) -> list[dict[int, float]]:
    """By request: position -> what the ranks said, each position once."""
    found: list[dict[int, float]] = [{} for _ in range(num_requests)]
    for outcome in outcomes:
        for scored in (scored for result in outcome.results for scored in result.scored):
            for position, logprob in enumerate(scored.logprobs, start=scored.start):
                assert position not in found[scored.seq_id], "scored twice"
                found[scored.seq_id][position] = logprob
    return found


def check(
    model: Path,
    texts: list[tuple[int, ...]],
    wanted: list[int | None],
    num_ranks: int,
    **job: object,
) -> list[Outcome]:
    requests = tuple(
        Request(text, SamplingParams(max_tokens=60, ignore_eos=True, prompt_logprobs=num))
        for text, num in zip(texts, wanted, strict=True)
    )
    outcomes = run_ranks(num_ranks, serve, Job(model, requests, **job))
    for text, asked, found in zip(texts, wanted, scores(outcomes, len(texts)), strict=True):
        num = asked or 0
        assert sorted(found) == list(range(len(text) - num, len(text)))
        values = [found[position] for position in sorted(found)]
        reference = expected(model, text)[len(text) - 1 - num :]
        torch.testing.assert_close(torch.tensor(values), torch.tensor(reference), rtol=0, atol=1e-4)
    return outcomes


@pytest.mark.parametrize(("num_ranks", "tp"), [(1, 1), (2, 1), (3, 1), (2, 2)])
def test_all_that_can_be_scored(model: Path, num_ranks: int, tp: int) -> None:
    """Whole prompts on one rank, and prompts that slices and stages cut anywhere."""
    texts = [prompt(length) for length in LENGTHS]
    check(model, texts, [len(text) - 1 for text in texts], num_ranks, tp=tp)


@pytest.mark.parametrize("num_wanted", [1, 2, 63, 64, 65, 200])
def test_the_last_few(model: Path, num_wanted: int) -> None:
    check(model, [prompt(333), prompt(300)], [num_wanted, None], 2)


def test_what_is_recomputed_is_not_scored_again(model: Path) -> None:
    texts = [prompt(40), prompt(41), prompt(42)]
    outcomes = check(model, texts, [39, 20, 41], 2, num_pages=28)
    assert outcomes[0].num_preemptions > 0


def test_more_rows_than_have_logits_at_a_time(model: Path) -> None:
    check(model, [prompt(333)], [332], 1, stage_tokens=512)


def test_logits_in_parts_of_the_vocabulary(model: Path) -> None:
    """KV by head, layouts in turn: in SP each rank scores its rows, in TP all ranks score all."""
    texts = [prompt(n) for n in (5, 150)]
    check(
        model,
        texts,
        [4, 149],
        3,
        placement=Placement.HEADS,
        layouts=(Layout.SP, Layout.TP),
        token_budget=50,
    )
