"""`csps submit`: flags -> one request."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from csps.cli.api_keys import ClientKeyFile, client_key
from csps.cli.terminal import console
from csps.cli.tls import Tls, TlsCa, read_client_tls
from csps.core.attention import AttentionKind
from csps.core.request import SamplingParams
from csps.rpc.client import AttentionChoice
from csps.submit import Submission, read_prompt
from csps.submit import submit as run_submission


def submit(
    target: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "127.0.0.1:50051",
    api_key_file: ClientKeyFile = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    file: Annotated[
        Path | None, typer.Option(help="Document to put before the prompt; - reads standard input.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="The question, or the whole prompt.")] = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    raw: Annotated[
        bool, typer.Option("--raw", help="Send plain text, without the chat template.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(help="Output tokens at most; default: the context's rest.")
    ] = 512,
    min_tokens: Annotated[int, typer.Option(help="No stop token before so many.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus, in (0, 1].")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest; 0: off.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the output; repeatable.")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence.")
    ] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="Log-probabilities, with so many alternatives.")
    ] = None,
    prompt_logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: log-probabilities of so many last tokens of the prompt."),
    ] = None,
    attention: Annotated[
        AttentionKind | None,
        typer.Option(help="How the prompt is prefilled; default: the server's choice."),
    ] = None,
    gamma: Annotated[
        float | None, typer.Option(help="Share of attention mass csa keeps, in (0, 1].")
    ] = None,
    window: Annotated[int | None, typer.Option(help="KV blocks csa-distance keeps whole.")] = None,
    report_heads: Annotated[
        bool, typer.Option("--report-heads", help="With --json: recall by layer and KV head.")
    ] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds before giving up.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write text, tokens and timings here.")
    ] = None,
) -> None:
    """Send a prompt and stream the answer.

    csps submit --file report.txt --prompt "What changed in March?"

    git log -p | csps submit --file - --prompt "Summarize these changes."

    csps submit --raw --prompt "Once upon a time" --temperature 0.8 --json story.json

    Without --file and --prompt, standard input is the prompt. The answer goes to standard
    output, progress and timings to standard error. Ctrl-C ends the request on the server.
    """
    stdin = None if sys.stdin.isatty() else sys.stdin.buffer
    submission = Submission(
        target=target,
        api_key=client_key(api_key_file),
        tls=read_client_tls(tls_ca, tls),
        prompt=read_prompt(file, prompt, stdin),
        sampling=SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=tuple(stop or ()),
            ignore_eos=ignore_eos,
            seed=seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        ),
        attention=AttentionChoice(attention, gamma, window, report_heads),
        raw=raw,
        system=system,
        timeout_s=timeout,
        json_path=json_file,
    )
    asyncio.run(run_submission(submission, console))
