"""Where TLS's certificates and keys come from: files in PEM, each read once."""

import ssl
from pathlib import Path
from typing import Annotated

import typer

from csps.core.config import ServerTls
from csps.core.errors import ConfigError
from csps.rpc.tls import CA_FLAG, SYSTEM_FLAG, ClientTls, has_certificates, http_context

CERT_FLAG, KEY_FLAG = "--tls-cert", "--tls-key"
_PANEL = "Server"
_FOREIGN = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")

TlsCert = Annotated[
    Path | None,
    typer.Option(
        CERT_FLAG,
        help="Serve gRPC and OpenAI's protocol over TLS, with the certificate in this PEM file, "
        f"behind it those that lead to its authority. With {KEY_FLAG}. Default: no TLS.",
        rich_help_panel=_PANEL,
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(
        KEY_FLAG,
        help=f"Private key of {CERT_FLAG}: a PEM file, RSA or ECDSA, without a passphrase.",
        rich_help_panel=_PANEL,
    ),
]

TlsCa = Annotated[
    Path | None,
    typer.Option(
        CA_FLAG,
        help="Speak TLS, to a server whose certificate is in this PEM file, or one of an authority "
        "in it.",
    ),
]
Tls = Annotated[
    bool,
    typer.Option(SYSTEM_FLAG, help="Speak TLS, to a server whose authority this machine trusts."),
]


def read_server_tls(certificate: Path | None, key: Path | None) -> ServerTls | None:
    """None without the flags. ConfigError, naming flag and file, if they cannot be served with."""
    if certificate is None and key is None:
        return None
    if certificate is None:
        raise ConfigError(f"{KEY_FLAG}: needs {CERT_FLAG}, the certificate of this key")
    if key is None:
        raise ConfigError(f"{CERT_FLAG}: needs {KEY_FLAG}, the private key of this certificate")
    tls = ServerTls(_certificates(CERT_FLAG, certificate), _read(KEY_FLAG, key))
    try:
        http_context(tls)
    except ssl.SSLError as error:
        if error.reason in _FOREIGN:
            problem = f"not the key of the certificate in {certificate}"
        elif error.reason is None:
            problem = "no private key in PEM, or one with a passphrase"
        else:
            problem = f"cannot be used with {certificate}: {error.reason}"
        raise ConfigError(f"{KEY_FLAG}: {key}: {problem}") from None
    return tls


def read_client_tls(authority: Path | None, system: bool) -> ClientTls | None:
    """None without the flags; the file wins. ConfigError, naming flag and file, if it is no PEM."""
    if authority is not None:
        return ClientTls(_certificates(CA_FLAG, authority))
    return ClientTls(_system_authorities()) if system else None


def _system_authorities() -> bytes:
    """Where OpenSSL finds them, not the list that gRPC brings along."""
    paths = ssl.get_default_verify_paths()
    if paths.cafile is not None:
        return _certificates(SYSTEM_FLAG, Path(paths.cafile))
    files = sorted(Path(paths.capath).glob("*.0")) if paths.capath is not None else []
    if not files:
        raise ConfigError(
            f"{SYSTEM_FLAG}: this machine has no list of authorities: name a file with {CA_FLAG}"
        )
    return b"\n".join(_read(SYSTEM_FLAG, file) for file in files)


def _certificates(flag: str, file: Path) -> bytes:
    pem = _read(flag, file)
    if not has_certificates(pem):
        raise ConfigError(f"{flag}: {file}: no certificate in PEM")
    return pem


def _read(flag: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag}: {file}: {error.strerror}") from None
