"""`bench peers`: CSPS and Hugging Face transformers on the same tokens, one after the other."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from importlib.util import find_spec
from statistics import median

from rich.console import Console

from csps.bench.measure import ServerFlags, request
from csps.bench.server import ServerProcess
from csps.checkpoint.locate import locate
from csps.core.config import DType
from csps.core.errors import ConfigError
from csps.percentiles import gaps_ms
from csps.rpc.client import GenerationClient

Sample = dict[str, object]


async def peers(
    flags: ServerFlags,
    prompt: list[int],
    output: int,
    peer_dtypes: list[str],
    repeat: int,
    console: Console,
) -> dict[str, object]:
    """Samples and medians of CSPS and of transformers in each dtype, and the ratios."""
    if find_spec("transformers") is None:
        raise ConfigError("bench peers: transformers is not installed; pip install 'csps[dev]'")
    for dtype in peer_dtypes:
        if dtype not in list(DType):
            raise ConfigError(f"--peer-dtypes: {dtype!r} is none of {', '.join(DType)}")
    threads = flags.ranks * flags.threads_per_rank
    samples: dict[str, list[Sample]] = {}
    for round_number in range(repeat):
        for dtype in peer_dtypes:
            console.print(f"round {round_number + 1}: transformers, {dtype}, {threads} threads ...")
            sample = await _transformers(flags, prompt, output, dtype, threads)
            samples.setdefault(f"transformers {dtype}", []).append(sample)
        console.print(f"round {round_number + 1}: csps, {flags.dtype}, {flags.ranks} ranks ...")
        samples.setdefault("csps", []).append(await _csps(flags, prompt, output))
    medians = {
        name: {
            "ttft_s": median(run["ttft_s"] for run in runs),  # type: ignore[type-var]
            "tbt_ms_p50": median(median(run["tbt_ms"]) for run in runs),  # type: ignore[call-overload]
        }
        for name, runs in samples.items()
    }
    ours = medians["csps"]
    # In each column the fastest peer: no peer is held back by a type that its machine lacks.
    best = {key: min(row[key] for name, row in medians.items() if name != "csps") for key in ours}
    return {
        "medians": medians | {"best peer": best},
        "peer_over_csps": {
            name: {key: theirs[key] / ours[key] for key in ours}
            for name, theirs in (medians | {"best peer": best}).items()
            if name != "csps"
        },
        "samples": samples,
    }


async def _csps(flags: ServerFlags, prompt: list[int], output: int) -> Sample:
    with ServerProcess(*flags.arguments()) as server:
        async with GenerationClient(server.target) as client:
            await request(client, prompt[:64], 3)
            measured = await request(client, prompt, output)
    return {
        "ttft_s": measured.client_ttft_s,
        "tbt_ms": gaps_ms(measured.arrivals),
        "token_ids": measured.token_ids,
    }


async def _transformers(
    flags: ServerFlags, prompt: list[int], output: int, dtype: str, threads: int
) -> Sample:
    question = {
        "path": str(locate(flags.model).path),
        "dtype": dtype,
        "threads": threads,
        "token_ids": prompt,
        "output": output,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "csps.bench.peer_transformers"),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
    )
    try:
        out, log = await process.communicate(json.dumps(question).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise ConfigError(f"bench peers: transformers failed:\n{log.decode()[-2000:]}")
    answer: Sample = json.loads(out)
    return answer
