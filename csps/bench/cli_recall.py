"""The `csps bench recall` command."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from csps.bench import record
from csps.bench.corpus import corpus_ids
from csps.bench.flags import Json, Model, Threads, show
from csps.bench.recall import audit, coverage
from csps.checkpoint.locate import DEFAULT_MODEL
from csps.core.attention import AttentionParams, CsaConfig
from csps.core.config import DType
from csps.core.errors import ConfigError, InvalidRequestError

ATTENTION, CSA = AttentionParams(), CsaConfig()  # their defaults are the server's


def recall(
    tokens: Annotated[int, typer.Option(min=64, help="Length of a prompt.")] = 3000,
    prompts: Annotated[
        int, typer.Option(min=1, help="Prompts, each another part of the text.")
    ] = 20,
    gamma: Annotated[
        float, typer.Option(help="Share of attention mass csa keeps.")
    ] = ATTENTION.gamma,
    min_recall: Annotated[
        float, typer.Option(help="As csps serve's --csa-min-recall.")
    ] = CSA.min_recall,
    min_recall_p5: Annotated[
        float, typer.Option(help="As csps serve's --csa-min-recall-p5.")
    ] = CSA.min_recall_p5,
    model: Model = DEFAULT_MODEL,
    dtype: DType = DType.BFLOAT16,
    block_size: Annotated[int, typer.Option(min=2, help="Tokens of a KV block.")] = 64,
    threads: Threads = 2,
    text: Annotated[
        Path | None, typer.Option(help="Real text; default: source of Python's standard library.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Whether the recall that sparse prefill reports is true.

    Prefills prompts sparsely, computes every row's attention in full beside it, and counts how
    often the exact recall of a layer and KV head lies in the reported 95% interval.
    """
    try:
        AttentionParams(gamma=gamma).validate()
        CsaConfig(min_recall=min_recall, min_recall_p5=min_recall_p5).validate()
    except InvalidRequestError as error:
        raise ConfigError(f"--gamma: {error.problem}") from None
    record.check_writable(json_file)
    token_ids = corpus_ids(model, tokens * prompts, text)
    request: dict[str, object] = {
        "model": model,
        "dtype": dtype.value,
        "block_size": block_size,
        "threads": threads,
        "gamma": gamma,
        "min_recall": min_recall,
        "min_recall_p5": min_recall_p5,
        "prompts": [
            {"token_ids": token_ids[i * tokens : (i + 1) * tokens], "seed": i}
            for i in range(prompts)
        ],
    }
    answers = asyncio.run(audit(request, prompts))
    summary = coverage(answers)
    show([summary], "prompts", "heads", "dense heads", "exact recall", "reported recall",
         "inside", "below", "prompts inside")  # fmt: skip
    del request["prompts"]
    parameters = {
        **request, "tokens": tokens, "prompts": prompts,
        "text": text.name if text else "Python standard library",
    }  # fmt: skip
    record.write(json_file, "recall", parameters, {"summary": summary, "prompts": answers})
