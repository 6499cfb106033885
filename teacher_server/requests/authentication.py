"""Authentication and TLS: the server's certificate, and the token that callers must present."""

from __future__ import annotations

import hmac
import math
import ssl
import time
from collections.abc import Iterable
from pathlib import Path

import grpc

from kvcore.errors import FieldError, KVDistillError
from kvcore.watched_files import WatchedFiles
from teacher_server.config import ServeConfig

MIN_TOKEN_BYTES = 16
# How long the token before a change is accepted, so that all clients can get the new one.
GRACE_SECONDS = 600.0


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
        _check_pair(key, cert)
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


class Tokens:
    """The tokens that callers may present: that of a file, and for a while the one before it.

    Raises:
        FieldError: the file cannot be read, or the token is too short.
    """

    def __init__(self, path: Path) -> None:
        self._files = WatchedFiles((path,), lambda: _read_token(path))
        self._newest = self._before = self._files.current()
        self._changed_at = -math.inf

    def accept(self, given: bytes) -> bool:
        """Whether this is one of the tokens. Each comparison takes constant time."""
        # A caller may have seen a new token first.
        return self._is_one(given) or self._is_one(given, at_once=True)

    def _is_one(self, given: bytes, *, at_once: bool = False) -> bool:
        token, now = self._files.current(at_once=at_once), time.monotonic()
        if token != self._newest:
            self._newest, self._before, self._changed_at = token, self._newest, now
        if hmac.compare_digest(given, token):
            return True
        return hmac.compare_digest(given, self._before) and now < self._changed_at + GRACE_SECONDS


def read_tokens(config: ServeConfig) -> Tokens | None:
    """The tokens that callers may present; None if no token is required.

    Raises:
        FieldError: the file cannot be read, or the token is too short.
    """
    return None if config.token_file is None else Tokens(config.token_file)


def _read_token(path: Path) -> bytes:
    token = _content(path, "token_file").strip()
    if len(token) < MIN_TOKEN_BYTES:
        raise FieldError(
            "token_file",
            f"the token in {path} has {len(token)} characters; at least {MIN_TOKEN_BYTES} are needed: "
            "create one with openssl rand -hex 32",
        )
    return token


def check_token(tokens: Tokens | None, metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Refuse a caller without a token.

    Args:
        tokens: that callers may present; None if no token is required.
        metadata: of the call.

    Raises:
        UnauthenticatedError: the token is missing or wrong.
    """
    if tokens is None:
        return
    header = dict(metadata).get("authorization", "")
    given = header if isinstance(header, bytes) else header.encode()
    if not given.startswith(b"Bearer ") or not tokens.accept(given.removeprefix(b"Bearer ")):
        raise UnauthenticatedError(
            "this server requires a token (KVDISTILL_TOKEN_FILE); the call had none or a wrong one"
        )


def _check_pair(key: Path, cert: Path) -> None:
    """Refuses files that are not a certificate and its key: gRPC itself would report them only on stderr."""
    try:
        # A key with a password is refused: nobody is there to type it.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:
        problem = f"{cert} and {key} are not a certificate and its key without a password: {error}"
        raise FieldError("tls_cert", problem) from error


def _content(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FieldError(field, f"cannot read {path}: {error.strerror}") from error
