"""`bench recall`: whether the recall that sparse prefill reports is true."""

import asyncio
import json
import math
import sys
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from statistics import fmean

from rich.progress import track

from csps.core.attention import CONFIDENCE_Z
from csps.core.errors import CspsError

Result = dict[str, object]
Head = dict[str, float]


async def audit(request: dict[str, object], num_prompts: int) -> list[Result]:
    """What csps.bench.audit_recall says of each prompt."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "csps.bench.audit_recall"), stdin=PIPE, stdout=PIPE, limit=1 << 24
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(request).encode())
        process.stdin.close()
        answers = []
        for _ in track(range(num_prompts), "auditing prompts"):
            line = await process.stdout.readline()
            if not line:
                raise CspsError("the audit ended before its last prompt (see above)")
            answers.append(json.loads(line))
        await process.wait()
        return answers
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def coverage(answers: Sequence[Result]) -> Result:
    """How often the exact recall lies in the reported 95% interval.

    By layer and KV head of each prompt, heads that ended dense left out (nothing was sampled
    there), and for each prompt's mean over its heads.
    """
    sparse = [
        head
        for answer in answers
        for head in answer["heads"]  # type: ignore[attr-defined]
        if head["gamma"] < 1.0
    ]
    if not sparse:
        raise CspsError("every head of every prompt fell back to dense attention: nothing to check")
    inside = [head["low"] <= head["exact"] <= head["high"] for head in sparse]
    below = [head["exact"] < head["low"] for head in sparse]
    means = [_mean_of_prompt(answer["heads"]) for answer in answers]  # type: ignore[arg-type]
    return {
        "prompts": len(answers),
        "heads": len(sparse),
        "dense heads": sum(len(answer["heads"]) for answer in answers) - len(sparse),  # type: ignore[arg-type, misc]
        "exact recall": fmean(head["exact"] for head in sparse),
        "reported recall": fmean(head["reported"] for head in sparse),
        "inside": fmean(inside),
        "below": fmean(below),
        "prompts inside": sum(mean["low"] <= mean["exact"] <= mean["high"] for mean in means),
        "prompt means": means,
    }


def _mean_of_prompt(heads: Sequence[Head]) -> Head:
    """As Complete.attention pools the heads of one prompt."""
    probes = sum(head["num_probes"] for head in heads)
    reported = sum(head["num_probes"] * head["reported"] for head in heads) / probes
    variance = sum(head["num_probes"] ** 2 * head["var"] for head in heads) / probes**2
    exact = fmean(head["exact"] for head in heads)
    spread = CONFIDENCE_Z * math.sqrt(variance)
    return {
        "reported": reported,
        "low": reported - spread,
        "high": reported + spread,
        "exact": exact,
    }
