"""Files of certificates and keys: what is taken, what is refused and how, what is never shown."""

import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from csps.cli.tls import read_client_tls, read_server_tls
from csps.core.config import ServerConfig, ServerTls, WorkerSetup
from csps.core.errors import ConfigError
from csps.rpc.tls import ClientTls, why_unreachable

BROKEN = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


@pytest.fixture(scope="module")
def issued() -> trustme.LeafCert:
    return trustme.CA().issue_cert("localhost")


@pytest.fixture
def certificate(issued: trustme.LeafCert, tmp_path: Path) -> Path:
    path = tmp_path / "certificate"
    issued.cert_chain_pems[0].write_to_path(path)
    return path


@pytest.fixture
def key(issued: trustme.LeafCert, tmp_path: Path) -> Path:
    path = tmp_path / "key"
    issued.private_key_pem.write_to_path(path)
    return path


def test_a_certificate_and_its_key(certificate: Path, key: Path) -> None:
    tls = read_server_tls(certificate, key)
    assert tls == ServerTls(certificate.read_bytes(), key.read_bytes())
    assert read_server_tls(None, None) is None


def test_one_flag_of_two(certificate: Path, key: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--tls-cert: needs --tls-key, "):
        read_server_tls(certificate, None)
    with pytest.raises(ConfigError, match=r"^--tls-key: needs --tls-cert, "):
        read_server_tls(None, key)


NO_CERTIFICATES = {
    "empty": b"",
    "a text": b"hello\n",
    "binary": bytes(range(256)),
    "broken": BROKEN,
}


@pytest.mark.parametrize("name", NO_CERTIFICATES)
def test_a_file_without_a_certificate(name: str, key: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(NO_CERTIFICATES[name])
    with pytest.raises(ConfigError, match=f"^--tls-cert: {file}: no certificate in PEM$"):
        read_server_tls(file, key)
    with pytest.raises(ConfigError, match=f"^--tls-ca: {file}: no certificate in PEM$"):
        read_client_tls(file, system=False)


def test_a_comment_that_is_not_ascii(certificate: Path, key: Path) -> None:
    """Lists of authorities have such."""
    certificate.write_bytes("# \u00e9quipe\n".encode("latin-1") + certificate.read_bytes())
    assert read_server_tls(certificate, key) is not None
    assert read_client_tls(certificate, system=False) is not None


def with_passphrase(key: Path) -> bytes:
    words = ("openssl", "pkcs8", "-topk8", "-passout", "pass:word", "-in", str(key))
    return subprocess.run(words, check=True, capture_output=True).stdout


NO_KEYS: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda _: b"",
    "a text": lambda _: b"hello\n",
    "a certificate": lambda key: (key.parent / "certificate").read_bytes(),
    "a passphrase": with_passphrase,
}


@pytest.mark.parametrize("name", NO_KEYS)
def test_a_file_without_a_key(name: str, certificate: Path, key: Path) -> None:
    key.write_bytes(NO_KEYS[name](key))
    with pytest.raises(ConfigError, match=f"^--tls-key: {key}: no private key in PEM, or one with"):
        read_server_tls(certificate, key)


@pytest.mark.parametrize("kind", trustme.KeyType)
def test_the_key_of_another(kind: trustme.KeyType, certificate: Path, key: Path) -> None:
    other = trustme.CA(key_type=kind).issue_cert("localhost", key_type=kind)
    other.private_key_pem.write_to_path(key)
    expected = f"^--tls-key: {key}: not the key of the certificate in {certificate}$"
    with pytest.raises(ConfigError, match=expected):
        read_server_tls(certificate, key)


def test_files_that_cannot_be_read(certificate: Path, key: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ConfigError, match=f"^--tls-cert: {missing}: No such file"):
        read_server_tls(missing, key)
    with pytest.raises(ConfigError, match=f"^--tls-key: {missing}: No such file"):
        read_server_tls(certificate, missing)
    with pytest.raises(ConfigError, match=f"^--tls-key: {tmp_path}: Is a directory"):
        read_server_tls(certificate, tmp_path)
    with pytest.raises(ConfigError, match=f"^--tls-ca: {missing}: No such file"):
        read_client_tls(missing, system=True)


def test_what_a_client_trusts(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    found = ClientTls(certificate.read_bytes())
    assert read_client_tls(None, system=False) is None
    assert read_client_tls(None, system=True) == found
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    assert read_client_tls(certificate, system=True) == found


def test_authorities_in_a_folder(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = certificate.parent / "authorities"
    monkeypatch.setattr(
        ssl,
        "get_default_verify_paths",
        lambda: ssl.DefaultVerifyPaths(None, str(folder), "", "", "", ""),
    )
    with pytest.raises(ConfigError, match=r"^--tls: this machine has no list of authorities"):
        read_client_tls(None, system=True)
    folder.mkdir()
    (folder / "0123abcd.0").symlink_to(certificate)
    assert read_client_tls(None, system=True) == ClientTls(certificate.read_bytes())


def test_nothing_prints_a_key(certificate: Path, key: Path) -> None:
    tls = read_server_tls(certificate, key)
    for config in (tls, ServerConfig(WorkerSetup("m"), tls=tls)):
        assert "BEGIN" not in f"{config!r} {config}"


REFUSED = "last error: UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host"


@pytest.mark.parametrize("tls", [None, ClientTls(b"")])
def test_no_server_is_not_blamed_on_tls(tls: ClientTls | None) -> None:
    assert why_unreachable(REFUSED, "here:1", tls) == f"no server answers at here:1 ({REFUSED})"
