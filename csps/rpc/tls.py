"""TLS of the public ports: what a server shows, what a client trusts, and what went wrong."""

import contextlib
import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from csps.core.config import ServerTls
from csps.rpc.options import COMMON_OPTIONS

CA_FLAG, SYSTEM_FLAG = "--tls-ca", "--tls"
_NO_GRPC = ("Socket closed", "Connection reset", "SETTINGS frame")  # a connection, and no more


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How a client speaks TLS. `authorities`: in PEM, those whose word for a server counts."""

    authorities: bytes = field(repr=False)


def open_channel(target: str, tls: ClientTls | None) -> grpc.aio.Channel:
    """To "host:port", in clear text without `tls`."""
    if tls is None:
        return grpc.aio.insecure_channel(target, options=COMMON_OPTIONS)
    credentials = grpc.ssl_channel_credentials(tls.authorities)
    return grpc.aio.secure_channel(target, credentials, options=COMMON_OPTIONS)


def why_unreachable(details: str, target: str, tls: ClientTls | None) -> str:
    """What a user is told when no connection came about; `details` are gRPC's."""
    if tls is None and any(text in details for text in _NO_GRPC):
        return (
            f"{target} ends connections in clear text; if it speaks TLS, add {CA_FLAG} FILE or "
            f"{SYSTEM_FLAG} ({details})"
        )
    if tls is not None and "WRONG_VERSION_NUMBER" in details:
        return f"{target} speaks no TLS: leave out {CA_FLAG} and {SYSTEM_FLAG} ({details})"
    if tls is not None and "CERTIFICATE_VERIFY_FAILED" in details:
        return (
            f"the certificate of {target} is not trusted: {CA_FLAG} FILE names its authority, or "
            f"itself if it is self-signed ({details})"
        )
    if tls is not None and "Hostname Verification" in details:
        return f"the certificate of {target} is for another name ({details})"
    return f"no server answers at {target} ({details})"


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """For gRPC."""
    return grpc.ssl_server_credentials([(tls.key, tls.certificates)])


def http_context(tls: ServerTls) -> ssl.SSLContext:
    """For HTTP. ssl.SSLError if the key is none, has a passphrase, or is not the certificate's."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    with _as_file(tls.certificates) as certificates, _as_file(tls.key) as key:
        # An empty passphrase: without one, ssl would ask the terminal for it.
        context.load_cert_chain(certificates, key, password="")
    return context


def has_certificates(pem: bytes) -> bool:
    """Whether this is at least one certificate in PEM, and nothing broken."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        with _as_file(pem) as path:
            context.load_verify_locations(path)
    except ssl.SSLError:
        return False
    return context.cert_store_stats()["x509"] > 0


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """A path to read `data` from, in memory: ssl takes files only, and no disk shall see a key."""
    with open(os.memfd_create("tls"), "wb") as file:
        file.write(data)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"
