"""What a link between two namespaces really carries, measured without torch.

As a program it is one end of that: `python -m csps.bench.link receive ADDRESS` or
`... send ADDRESS NUM_BYTES`.
"""

import json
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

from csps.bench.namespaces import Links, NamespaceError

PORT = 29400  # every namespace has all its ports to itself
PINGS = 20
CHUNK_BYTES = 2**20
SECONDS = 1.0  # of sending at the link's rate
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """`mbit`: 10^6 bits of payload a second over one TCP stream. `rtt_ms`: there and back."""

    mbit: float
    rtt_ms: float


def measure_link(links: Links) -> LinkSpeed:
    """From rank 0 to rank 1, while nothing else is sent. NamespaceError if it fails."""
    program = (sys.executable, "-m", "csps.bench.link")
    address = links.address(1)
    num_bytes = int(links.mbit * SECONDS * 1e6 / 8)
    receiver = subprocess.Popen(
        links.inside(1, *program, "receive", address),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        process_group=0,
    )  # fmt: skip
    with receiver:
        try:
            assert receiver.stdout is not None
            receiver.stdout.readline()  # it listens, or has failed and says why
            sender = subprocess.run(
                links.inside(0, *program, "send", address, str(num_bytes)),
                stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                timeout=TIMEOUT_S, process_group=0,
            )  # fmt: skip
            output, errors = receiver.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise NamespaceError(f"bench network: no data reach {address}") from None
        finally:
            receiver.kill()
    if sender.returncode or receiver.returncode:
        raise NamespaceError(f"bench network: no data reach {address}: {sender.stderr}{errors}")
    return LinkSpeed(json.loads(output)["mbit"], json.loads(sender.stdout)["rtt_ms"])


def receive(address: str) -> dict[str, float]:
    """Echo the pings, take the rest until it ends."""
    with socket.create_server((address, PORT)) as server:
        server.settimeout(TIMEOUT_S)
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        connection, _ = server.accept()
    with connection:
        connection.settimeout(TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(PINGS):
            connection.sendall(connection.recv(1))
        buffer = bytearray(CHUNK_BYTES)
        connection.recv_into(buffer)
        begun, num_bytes = time.perf_counter(), 0
        while size := connection.recv_into(buffer):
            num_bytes += size
        return {"mbit": num_bytes * 8 / 1e6 / (time.perf_counter() - begun)}


def send(address: str, num_bytes: int) -> dict[str, float]:
    """The fastest ping's time; then as many bytes as fast as they go."""
    with socket.create_connection((address, PORT), timeout=TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        for _ in range(PINGS):
            begun = time.perf_counter()
            connection.sendall(b"?")
            connection.recv(1)
            times.append(time.perf_counter() - begun)
        chunk = bytes(CHUNK_BYTES)
        for _ in range(-(-num_bytes // CHUNK_BYTES)):
            connection.sendall(chunk)
    return {"rtt_ms": min(times) * 1e3}


def main(role: str, address: str, num_bytes: str = "0") -> None:
    speed = receive(address) if role == "receive" else send(address, int(num_bytes))
    sys.stdout.write(json.dumps(speed) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
