"""`csps submit`: one prompt to a server, its answer to the terminal."""

import asyncio
import json
import sys
import time
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from csps.core.errors import ConfigError, CspsError
from csps.core.request import SamplingParams
from csps.percentiles import gaps_ms, percentile
from csps.rpc.client import (
    AttentionChoice,
    Chunk,
    Complete,
    GenerationClient,
    Progress,
    TokenLogprob,
)
from csps.rpc.tls import ClientTls


@dataclass(frozen=True, slots=True)
class Submission:
    """What to send and where the report goes."""

    target: str
    prompt: str
    sampling: SamplingParams
    api_key: str = field(default="", repr=False)
    tls: ClientTls | None = None
    attention: AttentionChoice = field(default_factory=AttentionChoice)
    raw: bool = False
    system: str = ""
    timeout_s: float | None = None
    json_path: Path | None = None


@dataclass(slots=True)
class Answer:
    """What came back. `arrivals` are time.monotonic of each chunk's arrival."""

    started: float = field(default_factory=time.monotonic)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    complete: Complete | None = None
    error: str | None = None


def read_prompt(file: Path | None, question: str, stdin: IO[bytes] | None) -> str:
    """Document first, question last. ConfigError naming the source of whatever is wrong."""
    document = ""
    if str(file) == "-" or (file is None and not question and stdin is not None):
        document = _decode(stdin.read() if stdin is not None else b"", "standard input")
    elif file is not None:
        try:
            document = _decode(file.read_bytes(), str(file))
        except OSError as error:
            raise ConfigError(f"--file: {file}: {error.strerror}") from None
    prompt = "\n\n".join(part for part in (document, question) if part)
    if not prompt:
        raise ConfigError("--prompt, --file: give one of them, or pipe a text in")
    return prompt


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 at byte {error.start}") from None


async def submit(submission: Submission, console: Console) -> None:
    """Stream the answer to stdout, progress and report to `console` (stderr).

    The JSON is written also when the request fails or is cancelled: with what came until then,
    and `error`. ConfigError if it cannot be written, before anything is sent.
    """
    answer = Answer()
    _write_json(submission.json_path, answer)
    try:
        async with GenerationClient(
            submission.target, submission.api_key, submission.tls
        ) as client:
            prompt = await _prompt(client, submission)
            await _stream(client, prompt, submission, answer, console)
    except CspsError as error:
        answer.error = str(error)
        raise
    except asyncio.CancelledError:
        answer.error = "cancelled"
        raise
    finally:
        _write_json(submission.json_path, answer)
    if answer.complete is not None:
        console.print(_report(answer), highlight=False, soft_wrap=True)


async def _prompt(client: GenerationClient, submission: Submission) -> str | list[tuple[str, str]]:
    if submission.raw:
        return submission.prompt
    if not (await client.model_info(submission.timeout_s)).has_chat_template:
        raise ConfigError("the model has no chat template: add --raw to send plain text")
    system = [("system", submission.system)] if submission.system else []
    return [*system, ("user", submission.prompt)]


async def _stream(
    client: GenerationClient,
    prompt: str | list[tuple[str, str]],
    submission: Submission,
    answer: Answer,
    console: Console,
) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("sent", total=None)
        events = client.generate(
            prompt,
            submission.sampling,
            attention=submission.attention,
            timeout_s=submission.timeout_s,
        )
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Progress):
                    label = "queued" if event.queued else "prefill"
                    done, total = event.prefilled_tokens, event.total_tokens
                    bar.update(task, description=label, completed=done, total=total)
                elif isinstance(event, Chunk):
                    bar.stop()
                    _take(answer, event)
                else:
                    answer.complete = event
    if answer.text and not answer.text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()


def _take(answer: Answer, chunk: Chunk) -> None:
    answer.arrivals += [time.monotonic()] * len(chunk.token_ids)
    answer.token_ids += chunk.token_ids
    answer.logprobs += chunk.logprobs
    answer.text += chunk.text
    sys.stdout.write(chunk.text)
    sys.stdout.flush()


def _report(answer: Answer) -> str:
    complete = answer.complete
    assert complete is not None
    gaps = gaps_ms(answer.arrivals)
    decode_s = complete.last_token_s - complete.first_token_s
    rate = (complete.output_tokens - 1) / decode_s if decode_s > 0 else 0.0
    cached = f" ({complete.cached_tokens} cached)" if complete.cached_tokens else ""
    computed = complete.prompt_tokens - complete.cached_tokens
    prefill_s = complete.first_token_s - complete.first_scheduled_s
    return (
        f"[dim]{complete.prompt_tokens} prompt tokens{cached}, TTFT {complete.first_token_s:.2f} s "
        f"({computed / max(prefill_s, 1e-9):.0f} tok/s), "
        f"{complete.output_tokens} output tokens, TBT p50 {percentile(gaps, 0.5):.0f} ms "
        f"p99 {percentile(gaps, 0.99):.0f} ms ({rate:.1f} tok/s), {complete.finish_reason}"
        f"{_sparse_report(complete)}[/]"
    )


def _sparse_report(complete: Complete) -> str:
    sparse = complete.sparse
    if sparse is None:
        return ""
    return (
        f"\n{sparse.kind}: computed {sparse.density:.0%} of the attention, fetched "
        f"{sparse.union_density:.0%} of the remote KV; recall {sparse.recall_mean:.3f} "
        f"[{sparse.recall_low:.3f}, {sparse.recall_high:.3f}], p5 {sparse.recall_p5:.2f}, "
        f"{sparse.dense_share:.0%} of heads dense"
    )


def _write_json(path: Path | None, answer: Answer) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(_json(answer), indent=2, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"--json: {path}: {error.strerror}") from None


def _json(answer: Answer) -> dict[str, object]:
    gaps = gaps_ms(answer.arrivals)
    complete = answer.complete
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "logprobs": [asdict(entry) for entry in answer.logprobs],
        "finish_reason": complete.finish_reason if complete else None,
        "error": answer.error,
        "usage": {
            "prompt_tokens": complete.prompt_tokens if complete else None,
            "output_tokens": len(answer.token_ids),
            "cached_tokens": complete.cached_tokens if complete else None,
        },
        "timings": _timings(complete) if complete else None,
        "attention": asdict(complete.sparse) if complete and complete.sparse else None,
        "prompt_logprobs": complete.prompt_logprobs if complete else [],
        "client_ttft_s": answer.arrivals[0] - answer.started if answer.arrivals else None,
        "tbt_ms_p50": percentile(gaps, 0.5),
        "tbt_ms_p99": percentile(gaps, 0.99),
        "tbt_ms": gaps,
    }


def _timings(complete: Complete) -> dict[str, object]:
    fields = asdict(complete)
    del fields["sparse"], fields["prompt_logprobs"]
    return fields
