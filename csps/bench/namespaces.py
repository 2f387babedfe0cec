"""Linux network namespaces on links of a limited rate: a small cluster on one machine.

Each rank's namespace has one full-duplex link to a bridge in a hub namespace; this side has
an unlimited one, on which ranks reach the coordinator:

    rank 0 [eth0] ===== [p0]
    rank 1 [eth0] ===== [p1] bridge [here] ----- [csps<pid>] this side
                        hub
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Network

import psutil

from csps.core.errors import CspsError

INTERFACE = "eth0"  # of every rank, in its own namespace
MAX_RANKS = 200

NETWORKS = IPv4Network("10.213.0.0/16")
FIRST_RANK_HOST = 10

MTU_BYTES = 9000  # as in GPU clusters, and fewer packets for the CPUs that also compute
# What an idle link lets pass at once is free of charge, so it must be small beside the messages
# that are measured, yet above the largest packet: larger ones would be cut, at the CPUs' cost.
PACKET_BYTES = 32 * 2**10
BURST_BYTES = 40 * 2**10
# Ranks that send to one rank at a time queue before its link. All that TCP has under way finds
# room: a lost packet would stop a stream for 0.2 s, which the fabrics of GPU clusters, that
# never drop, do not know.
QUEUE_BYTES = 32 * 2**20
QUEUE_PACKETS = 100_000

_NAME = re.compile(r"csps-(\d+)-(?:hub|r\d+)")


class NamespaceError(CspsError):
    """The links cannot be made; the text says what is missing or which command failed."""


def requirements(is_root: bool, which: Callable[[str], str | None]) -> list[str]:
    """What is missing to make links, in words; `which` finds a program as shutil.which does."""
    missing = [] if is_root else ["not run by root"]
    return missing + [f"no {tool} found" for tool in ("ip", "tc") if which(tool) is None]


def check_requirements() -> None:
    """NamespaceError naming all that is missing."""
    if missing := requirements(os.geteuid() == 0, shutil.which):
        raise NamespaceError(
            "bench network: needs root and the programs ip and tc (iproute2): " + ", ".join(missing)
        )


def owner(name: str) -> int | None:
    """The process that made this namespace; None if it is not one of ours."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def free_network(destinations: Iterable[str], first: int) -> IPv4Network:
    """The first 10.213.x.0/24 from x = `first` on that no route leads to.

    `destinations` as in `ip -json route`. A route to more than 10.213.0.0/16, such as a VPN's
    10.0.0.0/8, does not count: it merely gives way to ours meanwhile. NamespaceError if all
    are taken.
    """
    words = (word for word in destinations if word != "default")
    networks = [IPv4Network(word, strict=False) for word in words]
    taken = [network for network in networks if network.subnet_of(NETWORKS)]
    candidates = list(NETWORKS.subnets(new_prefix=24))
    start = first % len(candidates)
    for candidate in candidates[start:] + candidates[:start]:
        if not any(candidate.overlaps(network) for network in taken):
            return candidate
    raise NamespaceError(f"bench network: no free network in {NETWORKS}")


@dataclass(frozen=True, slots=True)
class Links:
    """Namespaces of `num_ranks` ranks, as `linked` makes them.

    `mbit`: 10^6 bits a second, of each direction of each rank's link. `latency_ms` is added on
    the way from one rank to another. The process `pid` owns them.
    """

    num_ranks: int
    mbit: int
    latency_ms: float
    network: IPv4Network
    pid: int

    @property
    def host(self) -> str:
        """This side's address, which ranks reach."""
        return str(self.network[1])

    @property
    def hub(self) -> str:
        return f"csps-{self.pid}-hub"

    def name(self, rank: int) -> str:
        """The namespace of a rank."""
        return f"csps-{self.pid}-r{rank}"

    def address(self, rank: int) -> str:
        return str(self.network[FIRST_RANK_HOST + rank])

    def inside(self, rank: int, *command: str) -> list[str]:
        """The command that runs `command` in a rank's namespace, in one process."""
        return ["ip", "netns", "exec", self.name(rank), *command]


@contextmanager
def linked(num_ranks: int, mbit: int, latency_ms: float = 0.0) -> Iterator[Links]:
    """Make links; remove them, and every process in their namespaces, whatever happens.

    Also removes what processes that were killed have left. NamespaceError if links cannot be
    made here. Call it in the main thread, one at a time.
    """
    check_requirements()
    sweep()
    routes = json.loads(_run("ip", "-json", "-4", "route", "show", "table", "all") or "[]")
    pid = os.getpid()
    network = free_network((route["dst"] for route in routes), first=pid)
    links = Links(num_ranks, mbit, latency_ms, network, pid)
    try:
        _make_hub(links)
        for rank in range(num_ranks):
            _make_rank(links, rank)
        yield links
    finally:
        with _signals_deferred():
            _remove(pid)


def sweep() -> list[int]:
    """Remove what is left of processes that are no more; their ids."""
    gone = [pid for pid in _owners() if not _is_alive(pid)]
    for pid in gone:
        _remove(pid)
    return gone


def _make_hub(links: Links) -> None:
    hub, uplink = links.hub, _uplink(links.pid)
    _run("ip", "netns", "add", hub)
    _run("ip", "-n", hub, "link", "add", "bridge", "mtu", str(MTU_BYTES), "type", "bridge")
    _run("ip", "-n", hub, "link", "set", "bridge", "up")
    _run("ip", "link", "add", uplink, "type", "veth", "peer", "name", "here", "netns", hub)
    _run("ip", "-n", hub, "link", "set", "here", "mtu", str(MTU_BYTES), "master", "bridge", "up")
    _run("ip", "address", "add", f"{links.host}/{links.network.prefixlen}", "dev", uplink)
    _run("ip", "link", "set", uplink, "mtu", str(MTU_BYTES), "up")


def _make_rank(links: Links, rank: int) -> None:
    name, hub, port = links.name(rank), links.hub, f"p{rank}"
    address = f"{links.address(rank)}/{links.network.prefixlen}"
    sizes = ("mtu", str(MTU_BYTES), "gso_max_size", str(PACKET_BYTES))
    _run("ip", "netns", "add", name)
    _run("ip", "-n", name, "link", "set", "lo", "up")
    _run(
        *("ip", "-n", name, "link", "add", INTERFACE),
        *("type", "veth", "peer", "name", port, "netns", hub),
    )
    _run("ip", "-n", name, "address", "add", address, "dev", INTERFACE)
    _run("ip", "-n", name, "link", "set", INTERFACE, *sizes, "up")
    _run("ip", "-n", hub, "link", "set", port, *sizes, "master", "bridge", "up")
    # What goes out of the rank, then what comes in: it leaves the hub.
    for command in qdiscs(name, INTERFACE, links.mbit, links.latency_ms):
        _run(*command)
    for command in qdiscs(hub, port, links.mbit):
        _run(*command)


def qdiscs(
    namespace: str, interface: str, mbit: int, latency_ms: float = 0.0
) -> list[Sequence[str]]:
    """The commands that delay what leaves an interface, and limit its rate (tc-tbf(8))."""
    add = ("tc", "-n", namespace, "qdisc", "add", "dev", interface)
    limit = ("tbf", "rate", f"{mbit}mbit", "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES))
    if not latency_ms:
        return [(*add, "root", *limit)]
    delay = ("netem", "delay", f"{latency_ms}ms", "limit", str(QUEUE_PACKETS))
    return [(*add, "root", "handle", "1:", *delay), (*add, "parent", "1:1", *limit)]


def _remove(pid: int) -> None:
    """Kill all in the process's namespaces and delete them, and its link to them, if any."""
    names = [name for name in _names() if owner(name) == pid]
    for name in names:
        for inhabitant in _run("ip", "netns", "pids", name, check=False).split():
            with suppress(ProcessLookupError):
                os.kill(int(inhabitant), signal.SIGKILL)
    # It would go with its namespace, but later: the next one of this name must not meet it.
    _run("ip", "link", "delete", _uplink(pid), check=False)
    for name in names:
        _run("ip", "netns", "delete", name, check=False)


def _uplink(pid: int) -> str:
    return f"csps{pid}"  # at most 15 characters


def _names() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line]


def _owners() -> set[int]:
    return {pid for name in _names() if (pid := owner(name)) is not None}


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _run(*command: str, check: bool = True) -> str:
    """What the command writes. NamespaceError with what it says if it fails."""
    # A process group of its own: Ctrl-C must not end the commands that clean up after it.
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        process_group=0,
    )  # fmt: skip
    if check and done.returncode:
        hint = "; without netem in the kernel, leave --latency-ms out" if "netem" in command else ""
        raise NamespaceError(f"bench network: {shlex.join(command)}: {done.stderr.strip()}{hint}")
    return done.stdout


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """SIGINT and SIGTERM take effect when the block is over."""
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
