"""`csps bench network`: where links can be made, real ones; elsewhere, that it says why not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from csps.bench.link import measure_link
from csps.bench.namespaces import BURST_BYTES, NamespaceError, linked

TIMEOUT_S = 120.0
MBIT = 20
TOKENS = 600  # from --long-tokens 512 on a prompt spans the ranks
MARK = "CSPS_TEST_MARK"


def links_are_possible() -> bool:
    """Root, tools and a kernel that makes limited links: found out without the bench."""
    name = f"csps-test-{uuid.uuid4().hex[:8]}"
    script = f"""set -e
        ip netns add {name}
        trap 'ip netns delete {name}' EXIT
        ip -n {name} link add name bridge0 type bridge
        ip -n {name} link add name veth0 type veth peer name veth1
        tc -n {name} qdisc add dev veth0 root tbf rate 1mbit burst 10000 limit 100000"""
    return subprocess.run(["sh", "-c", script], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def possible() -> bool:
    return links_are_possible()


class Bench:
    """A running `csps bench network`. All that descend from it carry a mark."""

    def __init__(self, model: Path, *flags: str, **environment: str) -> None:
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "csps", "bench", "network", "--model", str(model)),
                *("--ranks", "2", "--mbit", str(MBIT), "--tokens", str(TOKENS)),
                *("--dtype", "float32", "--csa-min-tokens", "64", *flags),
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {MARK: self._mark} | environment,
        )

    def end(self) -> tuple[int, str]:
        """Status and what it wrote, after checks that nothing is left of it."""
        _, log = self.process.communicate(timeout=TIMEOUT_S)
        assert psutil.wait_procs(self.family(), timeout=10)[1] == [], log
        assert namespaces_of(self.process.pid) == []
        assert f"csps{self.process.pid}" not in psutil.net_if_addrs()
        assert "Traceback" not in log, log
        return self.process.returncode, log

    def family(self) -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["environ"])
            if (process.info["environ"] or {}).get(MARK) == self._mark
        ]


def namespaces_of(pid: int) -> list[str]:
    if shutil.which("ip") is None:
        return []
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split() if name.startswith(f"csps-{pid}-")]


def says_why_not(status: int, log: str) -> bool:
    """One line that names what is missing, or the command that did not work."""
    causes = [f"no {tool} found" for tool in ("ip", "tc") if shutil.which(tool) is None]
    causes += ["not run by root"] if os.geteuid() else []
    error = log.splitlines()[-1]
    if not causes:
        return status == 1 and error.startswith(
            ("error: bench network: ip ", "error: bench network: tc ")
        )
    named = all(cause in error for cause in causes)
    return status == 1 and error.startswith("error: bench network: ") and named


@dataclass
class Leftover:
    """A process in a namespace of a bench that was killed."""

    owner: int
    process: "subprocess.Popen[bytes]"


@pytest.fixture
def leftover(possible: bool) -> Iterator[Leftover | None]:
    if not possible:
        yield None
        return
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    name = f"csps-{dead.pid}-r0"
    subprocess.run(["ip", "netns", "add", name], check=True)
    process = subprocess.Popen(["ip", "netns", "exec", name, "sleep", "600"])
    yield Leftover(dead.pid, process)
    process.kill()
    process.wait()
    for name in namespaces_of(dead.pid):
        subprocess.run(["ip", "netns", "delete", name], check=True)


def test_prompts_over_limited_links(
    tiny: Path, tmp_path: Path, possible: bool, leftover: Leftover | None
) -> None:
    path = tmp_path / "network.json"
    bench = Bench(tiny, "--attention", "dense,csa", "--repeat", "2", "--json", str(path))
    status, log = bench.end()
    if not possible:
        assert says_why_not(status, log), log
        return
    assert status == 0, log
    record = json.loads(path.read_text())
    assert record["bench"] == "network"
    dense, csa, serial = record["results"]
    assert [dense["variant"], csa["variant"], serial["variant"]] == [
        "dense", "csa", "csa, no pipeline",
    ]  # fmt: skip
    for result in record["results"]:
        assert (result["ranks"], result["mbit"]) == (2, MBIT)
        assert 0 < result["link_mbit"] < 1.02 * MBIT
        assert len(result["runs"]) == 2
        for run in result["runs"]:
            assert run["tokens"] == TOKENS
            assert run["bytes_moved"] == sum(run["bytes_by_kind"].values())
            assert run["bytes_moved"] == sum(run["received_by_rank"]) > 0
            assert 0 <= run["exposed_comm_s"] <= run["comm_s"]
            assert run["exposed_share"] == pytest.approx(
                run["exposed_comm_s"] / (2 * run["prefill_s"])
            )
            # No step is faster than its bytes through the link, but for what one burst lets by.
            limited_bytes = run["received_bytes_max"] - BURST_BYTES
            assert run["ttft_s"] >= run["prefill_s"] >= limited_bytes * 8 / (MBIT * 1e6)
    assert [run["sparse"] for run in dense["runs"]] == [None, None]
    assert all(run["sparse"]["kind"] == "csa" for run in csa["runs"] + serial["runs"])
    assert leftover is not None
    assert leftover.process.wait(timeout=10) == -signal.SIGKILL
    assert namespaces_of(leftover.owner) == []


def test_a_terminated_bench_leaves_nothing(tiny: Path, possible: bool) -> None:
    bench = Bench(tiny)
    deadline = time.monotonic() + TIMEOUT_S
    ranks: list[psutil.Process] = []
    while len(ranks) < 2 and bench.process.poll() is None and time.monotonic() < deadline:
        ranks = [process for process in bench.family() if "worker" in process.cmdline()]
        time.sleep(0.1)
    bench.process.send_signal(signal.SIGTERM)
    status, log = bench.end()
    if possible:
        assert len(ranks) == 2
        assert status == 128 + signal.SIGTERM, log
    else:
        assert says_why_not(status, log), log


def test_missing_programs_are_named(tiny: Path, tmp_path: Path) -> None:
    status, log = Bench(tiny, PATH=str(tmp_path)).end()
    assert status == 1
    error = log.splitlines()[-1]
    assert error.startswith("error: bench network: needs root and the programs ip and tc")
    assert error.endswith("no ip found, no tc found")


def test_a_delay_is_added_or_refused(possible: bool) -> None:
    problem = ""
    try:
        with linked(2, 500, latency_ms=2.0) as links:
            rtt_ms = measure_link(links).rtt_ms
    except NamespaceError as error:
        problem = str(error)
    if possible and problem:
        assert "netem" in problem
        assert "leave --latency-ms out" in problem
    elif possible:
        assert rtt_ms >= 4.0
    else:
        assert problem.startswith("bench network: ")
    assert namespaces_of(os.getpid()) == []
