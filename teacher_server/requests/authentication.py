"""Authentication and TLS: the server's certificate, and the token that callers must present."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from pathlib import Path

import grpc

from kvcore.errors import FieldError, KVDistillError
from kvcore.watched_files import WatchedFiles
from teacher_server.config import ServeConfig

MIN_TOKEN_BYTES = 16


class UnauthenticatedError(KVDistillError):
    """The caller did not present the server's token."""


CertificateFiles = WatchedFiles[grpc.ServerCertificateConfiguration]


def certificate_files(config: ServeConfig) -> CertificateFiles | None:
    """The server's certificate and key; None if it serves without TLS.

    Raises:
        FieldError: a file cannot be read.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    key, cert = config.tls_key, config.tls_cert

    def read() -> grpc.ServerCertificateConfiguration:
        pair = (_content(key, "tls_key"), _content(cert, "tls_cert"))
        return grpc.ssl_server_certificate_configuration([pair])

    return WatchedFiles((key, cert), read)


def server_credentials(files: CertificateFiles) -> grpc.ServerCredentials:
    """Credentials for one server, whose new connections use changed files. Another server needs its own."""
    used = files.current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal used
        before, used = used, files.current()
        return None if used is before else used

    # gRPC takes None for no change, which its type stubs do not say.
    return grpc.dynamic_ssl_server_credentials(used, changed)  # pyright: ignore[reportArgumentType]


def token_source(config: ServeConfig) -> Callable[[], bytes] | None:
    """Returns the token that callers must present, also after its file has changed; None if no token is required.

    Raises:
        FieldError: the file cannot be read, or the token is too short.
    """
    if config.token_file is None:
        return None
    path = config.token_file
    return WatchedFiles((path,), lambda: _read_token(path)).current


def _read_token(path: Path) -> bytes:
    token = _content(path, "token_file").strip()
    if len(token) < MIN_TOKEN_BYTES:
        raise FieldError(
            "token_file",
            f"the token in {path} has {len(token)} characters; at least {MIN_TOKEN_BYTES} are needed: "
            "create one with openssl rand -hex 32",
        )
    return token


def check_token(token: Callable[[], bytes] | None, metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Refuse a caller without the token. The comparison takes constant time.

    Args:
        token: returns the token; None if no token is required.
        metadata: of the call.

    Raises:
        UnauthenticatedError: the token is missing or wrong.
    """
    if token is None:
        return
    header = dict(metadata).get("authorization", "")
    given = header if isinstance(header, bytes) else header.encode()
    if not hmac.compare_digest(given, b"Bearer " + token()):
        raise UnauthenticatedError(
            "this server requires a token (KVDISTILL_TOKEN_FILE); the call had none or a wrong one"
        )


def _content(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FieldError(field, f"cannot read {path}: {error.strerror}") from error
