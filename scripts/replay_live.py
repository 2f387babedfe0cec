"""Replay a trace to live servers of every strategy, one replay at a time.

    csps trace scale conversation.jsonl --divide 32 --to 300 --cut --out slice.jsonl
    python scripts/replay_live.py slice.jsonl --speeds 1,3 --text book.txt --out runs
    csps compare runs/x3-*

All servers run throughout, so replays of one speed are close in time; those without a request
take no processor time. Every speed has prompts of its own: no cache helps the next. --server
NAME=FLAGS, once for each, replaces the four servers; each gets --workers 2 unless FLAGS say more.
"""

import argparse
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from csps.bench.server import ServerProcess
from csps.core.errors import CspsError
from csps.core.strategy import Strategy

COMMON = ("--workers", "2", "--log-level", "WARNING")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path, help="in any format that csps replay reads")
    parser.add_argument("--out", type=Path, required=True, help="gets a run xSPEED-NAME of each")
    parser.add_argument("--speeds", default="1", help="factors on the trace's clock, by commas")
    parser.add_argument("--server", action="append", metavar="NAME=FLAGS", default=[])
    parser.add_argument("--common", default="", help="flags of csps serve for all servers")
    parser.add_argument("--seed", type=int, default=0, help="of the first speed's prompts")
    parser.add_argument("--text", type=Path, help="as of csps replay")
    parser.add_argument("--slo-ttft", help="as of csps replay")
    parser.add_argument("--slo-tbt", help="as of csps replay")
    asked = parser.parse_args()
    flags = dict(text.split("=", 1) for text in asked.server) or {
        strategy.value: f"--strategy {strategy}" for strategy in Strategy
    }
    given = {"--text": asked.text, "--slo-ttft": asked.slo_ttft, "--slo-tbt": asked.slo_tbt}
    options = [str(word) for pair in given.items() if pair[1] is not None for word in pair]
    try:
        with ExitStack() as stack:
            targets = {}
            for name, words in flags.items():
                print(f"starting {name}", flush=True)
                server = ServerProcess(*COMMON, *shlex.split(asked.common), *shlex.split(words))
                targets[name] = stack.enter_context(server).target
            for index, speed in enumerate(asked.speeds.split(",")):
                for name, target in targets.items():
                    label = f"x{speed}-{name}"
                    print(f"replaying {label}", flush=True)
                    command = [sys.executable, "-m", "csps", "replay", str(asked.trace)]
                    command += ["--target", target, "--out", str(asked.out / label)]
                    command += ["--speed", speed, "--seed", str(asked.seed + index)]
                    subprocess.run([*command, "--name", label, *options], check=True)
    except (CspsError, subprocess.CalledProcessError, KeyboardInterrupt) as error:
        sys.exit(f"ended: {error or 'interrupted'}")


if __name__ == "__main__":
    main()
