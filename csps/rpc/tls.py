"""TLS of the public ports: what a server shows, over gRPC and HTTP."""

import contextlib
import os
import ssl
from collections.abc import Iterator

import grpc

from csps.core.config import ServerTls


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
