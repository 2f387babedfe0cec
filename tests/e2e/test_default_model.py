"""The default model, served: greedy tokens in fp32 equal transformers', by every strategy."""

import argparse
import asyncio
from pathlib import Path

import pytest
import torch
import transformers

from csps.bench.peer_transformers import load, run
from csps.bench.server import ServerProcess
from csps.checkpoint.locate import DEFAULT_MODEL, locate
from csps.checkpoint.tokenizer import load_tokenizer
from csps.core.request import SamplingParams
from csps.rpc.client import GenerationClient

LENGTHS = (1, 17, 700, 2300)
NUM_OUTPUT = 32
STAGE_TOKENS = 1024  # the longest prompt takes three


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Starts of a real document: a module of the standard library."""
    text = Path(argparse.__file__).read_text()
    token_ids = load_tokenizer(locate(DEFAULT_MODEL)).encode(text, add_special_tokens=True)
    return [token_ids[:length] for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(prompts) -> list[list[int]]:
    transformers.logging.set_verbosity_error()
    model = load(locate(DEFAULT_MODEL).path, torch.float32)
    torch.set_num_threads(2)
    try:
        return [run(model, prompt, NUM_OUTPUT)["token_ids"] for prompt in prompts]
    finally:
        torch.set_num_threads(1)


async def generate(client: GenerationClient, prompt: list[int]) -> list[int]:
    sampling = SamplingParams(max_tokens=NUM_OUTPUT, ignore_eos=True)
    tokens: list[int] = []
    async for event in client.generate(prompt, sampling, timeout_s=300):
        tokens += getattr(event, "token_ids", ())
    return tokens


async def cancelled(client: GenerationClient, prompt: list[int], after_s: float) -> None:
    task = asyncio.create_task(generate(client, prompt))
    await asyncio.sleep(after_s)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def alone_then_together(
    target: str, prompts: list[list[int]], num_alone: int
) -> list[list[list[int]]]:
    """Some prompts by themselves, then all at once with others that are cancelled in between."""
    async with GenerationClient(target) as client:
        alone = [await generate(client, prompt) for prompt in prompts[:num_alone]]
        disturbing = [cancelled(client, prompts[2], 0.4 * i) for i in range(5)]
        together = await asyncio.gather(
            *(generate(client, prompt) for prompt in prompts), *disturbing
        )
        load = await client.load()
        while load.num_running or load.num_waiting:
            await asyncio.sleep(0.1)
            load = await client.load()
        info = await client.server_info()
    assert not any(info.used_blocks_by_rank)
    return [alone, together[: len(prompts)]]


@pytest.mark.parametrize(
    ("strategy", "num_ranks"),
    [("ring", 1), ("ring", 2), ("ring", 4), ("sarathi", 2), ("shift", 2)],
)
def test_greedy_tokens_equal_transformers(strategy, num_ranks, prompts, expected) -> None:
    flags = ("--strategy", strategy, "--workers", str(num_ranks), "--dtype", "float32")
    # Chunks of prompts in the SP layout, decodes in TP.
    flags += ("--stage-tokens", str(STAGE_TOKENS), "--shift-threshold", "64")
    with ServerProcess(*flags) as server:
        # Rules of strategies and odd numbers of ranks are tested with tiny models; here they meet
        # real weights.
        num_alone = len(prompts) if num_ranks == 4 else 1
        alone, together = asyncio.run(alone_then_together(server.target, prompts, num_alone))
        assert server.stop() == 0, server.log
    assert alone == expected[:num_alone]
    assert together == expected
