"""Write a trace whose replay makes steps of every kind, for `csps calibrate`.

    python scripts/calibration_trace.py --out calibration.jsonl
    python scripts/replay_live.py calibration.jsonl --out runs
    csps calibrate runs/x1-* --name here --out here.toml

Prompts one at a time; answers of 1 to 32 streams at once after short prompts, and some after long
ones; then prompts that are prefilled while 1, 4 or 16 streams decode. Nothing is shared. The pauses
suit a machine that prefills --rate tokens a second: on a faster one servers are idle between
bursts, on one half as fast these run into each other, and fewer steps are alone.
"""

import argparse
from pathlib import Path

from csps.trace.schema import Trace, TraceRequest, write_trace

BLOCK_TOKENS = 16
ALONE = (48, 100, 200, 400, 800, 48, 100, 200, 400, 800, 1600, 3200)  # prompt tokens
STREAMS = (1, 2, 4, 8, 16, 32)
OUTPUT = 24
BESIDE = {1: 160, 4: 60, 16: 40}  # output tokens of so many streams
INTERRUPTING = (1000, 200, 1000, 200, 200)  # prompt tokens
SHORT, LONG = 32, 1200  # prompt tokens of streams
STEP_S, STREAM_S = 0.05, 0.02  # of a decode step, and of each of its streams, where --rate is 300


class Writer:
    """Requests at a moving time."""

    def __init__(self, rate: float) -> None:
        self.requests: list[TraceRequest] = []
        self._rate = rate
        self._now = 0.0
        self._blocks = 0

    def add(self, prompt_tokens: int, output_tokens: int) -> None:
        num = -(-prompt_tokens // BLOCK_TOKENS)
        blocks = tuple(range(self._blocks, self._blocks + num))
        self._blocks += num
        index = len(self.requests)
        self.requests.append(
            TraceRequest(self._now, prompt_tokens, output_tokens, blocks, session=index, turn=1)
        )

    def wait(self, prompt_tokens: int, steps: int = 0, streams: int = 0) -> None:
        """For as long as such prompts and so many decode steps take, and a bit more."""
        decode_s = steps * (STEP_S + STREAM_S * streams) * 300 / self._rate
        self._now = round(self._now + 1.3 * (prompt_tokens / self._rate + decode_s) + 0.3, 3)


def calibration(rate: float) -> Trace:
    """The trace; `rate` in prompt tokens per second."""
    writer = Writer(rate)
    for tokens in ALONE:
        writer.add(tokens, 1)
        writer.wait(tokens)
    for num, tokens in [*((num, SHORT) for num in STREAMS), (4, LONG)]:
        for _ in range(num):
            writer.add(tokens, OUTPUT)
        writer.wait(num * tokens, OUTPUT, num)
    for num, output in BESIDE.items():
        for _ in range(num):
            writer.add(SHORT, output)
        writer.wait(num * SHORT, 2, num)
        for tokens in INTERRUPTING:
            writer.add(tokens, 1)
        writer.wait(sum(INTERRUPTING), output, num)
    source = f"scripts/calibration_trace.py --rate {rate:g}"
    return Trace("calibration", source, BLOCK_TOKENS, tuple(writer.requests))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=300.0, help="prefill, tokens per second")
    asked = parser.parse_args()
    trace = calibration(asked.rate)
    write_trace(asked.out, trace)
    last = trace.requests[-1].arrival_s
    print(f"{asked.out}: {len(trace.requests)} requests in {last:.0f} s")


if __name__ == "__main__":
    main()
