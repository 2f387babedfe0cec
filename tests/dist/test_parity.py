"""N ranks against transformers on one: greedy tokens equal, in fp32, on tiny random models."""

from pathlib import Path

import pytest
import torch
import transformers

from csps.core.plan import Lane
from csps.core.request import SamplingParams
from tests.checkpoints import write_tiny
from tests.dist.ranks import Job, Outcome, Request, run_ranks, serve

LENGTHS = (1, 5, 15, 16, 17, 64, 65, 150, 333)
NUM_OUTPUT = 24


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request, tmp_path_factory) -> Path:
    return write_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, 160, (n,), generator=generator).tolist()) for n in lengths]


def greedy(model: Path, prompt: tuple[int, ...], num_output: int) -> tuple[int, ...]:
    """What transformers draws, one prompt at a time."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        output = reference.eval().generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=num_output,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return tuple(output[0, len(prompt) :].tolist())


def sampling(num_output: int = NUM_OUTPUT) -> SamplingParams:
    return SamplingParams(max_tokens=num_output, ignore_eos=True)


def check(outcomes: list[Outcome], expected: list[tuple[int, ...]]) -> None:
    for outcome in outcomes:
        assert outcome.outputs == tuple(expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_equal_to_transformers(model: Path, num_ranks: int) -> None:
    """All lengths at once, short ones whole on one rank, long ones staged over all ranks."""
    texts = prompts(LENGTHS)
    expected = [greedy(model, text, NUM_OUTPUT) for text in texts]
    requests = tuple(Request(text, sampling(), start_step=i) for i, text in enumerate(texts))
    check(run_ranks(num_ranks, serve, Job(model, requests)), expected)


@pytest.mark.parametrize(("num_ranks", "tp"), [(2, 2), (3, 3), (4, 2)])
def test_tensor_parallel(llama: Path, num_ranks: int, tp: int) -> None:
    """3 KV heads and 6 query heads, which 2 ranks share unevenly."""
    texts = prompts((1, 17, 150, 333), seed=1)
    expected = [greedy(llama, text, NUM_OUTPUT) for text in texts]
    requests = tuple(Request(text, sampling()) for text in texts)
    check(run_ranks(num_ranks, serve, Job(llama, requests, tp=tp)), expected)


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_block_sizes(llama: Path, block_size: int) -> None:
    texts = prompts((40, 130), seed=2)
    expected = [greedy(llama, text, NUM_OUTPUT) for text in texts]
    job = Job(
        llama,
        tuple(Request(text, sampling()) for text in texts),
        block_size=block_size,
        num_pages=400 // block_size + 8,
    )
    check(run_ranks(3, serve, job), expected)


def test_cancelled_neighbours(llama: Path) -> None:
    """Streams that end early, between and beside the others, change nothing for them."""
    texts = prompts((20, 90, 200, 33, 70, 10), seed=3)
    keep = (0, 2, 4)
    requests = tuple(
        Request(text, sampling(), start_step=2 * i, abort_after=None if i in keep else i)
        for i, text in enumerate(texts)
    )
    for outcome in run_ranks(2, serve, Job(llama, requests)):
        for i in keep:
            assert outcome.outputs[i] == greedy(llama, texts[i], NUM_OUTPUT)
        assert len(outcome.outputs[1]) < NUM_OUTPUT


def test_preemption_recomputes(llama: Path) -> None:
    """KV for less than all: the youngest is thrown out, recomputed, and draws the same tokens."""
    texts = prompts((40, 40, 40), seed=4)
    requests = tuple(Request(text, sampling(60)) for text in texts)
    outcomes = run_ranks(2, serve, Job(llama, requests, num_pages=28))
    assert outcomes[0].num_preemptions > 0
    check(outcomes, [greedy(llama, text, 60) for text in texts])


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_no_rank_holds_more_than_its_share(llama: Path, num_ranks: int) -> None:
    """After prefill and after 500 decoded tokens: share of the blocks plus two at most."""
    texts = prompts((401,), seed=5)
    job = Job(llama, (Request(texts[0], sampling(500)),), max_model_len=1000, num_pages=400)
    outcome = run_ranks(num_ranks, serve, job)[0]
    total = sum(outcome.max_blocks[0])
    assert total >= 900 // job.block_size
    assert max(outcome.max_blocks[0]) <= total / num_ranks + 2


def test_decode_moves_what_the_formula_says(llama: Path) -> None:
    """(P - 1) (2 q + 4 Hq) bytes per token and layer, whoever sends them; nothing else."""
    num_ranks, num_layers, num_heads, head_dim = 3, 3, 6, 16
    job = Job(llama, (Request(prompts((200,))[0], sampling()),))
    outcomes = run_ranks(num_ranks, serve, job)
    moved = tokens = 0
    for outcome in outcomes:
        for result in outcome.results:
            if result.lane is Lane.DECODE:
                moved += sum(result.stats.bytes_sent.values())
    tokens = sum(plan.num_tokens for plan in outcomes[0].plans if plan.lane is Lane.DECODE)
    query_bytes = num_heads * head_dim * 4
    assert moved == tokens * num_layers * (num_ranks - 1) * (2 * query_bytes + 4 * num_heads)


def test_prefill_moves_what_the_formula_says(llama: Path) -> None:
    """One step: each rank sends f S k bytes per layer, f = (P - 1) / P, k = 2 Hkv D e."""
    num_ranks, num_tokens, num_layers, kv_heads, head_dim = 4, 320, 3, 3, 16
    job = Job(llama, (Request(prompts((num_tokens,))[0], sampling(1)),), stage_tokens=num_tokens)
    for outcome in run_ranks(num_ranks, serve, job):
        (result,) = outcome.results
        sent = num_layers * (num_ranks - 1) * num_tokens // num_ranks * 2 * kv_heads * head_dim * 4
        assert result.stats.bytes_sent == {"kv": sent}
        assert result.stats.wall_s >= result.stats.exposed_comm_s >= 0.0


def test_a_rank_that_fails_is_named() -> None:
    with pytest.raises(AssertionError, match=r"rank \d:[\s\S]*no such directory"):
        run_ranks(2, serve, Job(Path("/nonexistent"), ()))
