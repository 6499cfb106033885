"""Authentication and TLS: the server's certificate, and the certificate and token that callers must present."""

from __future__ import annotations

import hmac
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import grpc

from kvcore.certificates import check_pair, read_authorities, read_file
from kvcore.errors import FieldError, KVDistillError
from kvcore.watched_files import WatchedFiles
from teacher_server.config import ServeConfig

MIN_TOKEN_BYTES = 16
# How long the token before a change is accepted, so that all clients can get the new one.
GRACE_SECONDS = 600.0


class UnauthenticatedError(KVDistillError):
    """The caller did not present the server's token, or a certificate."""


CertificateFiles = WatchedFiles[grpc.ServerCertificateConfiguration]


def certificate_files(config: ServeConfig) -> CertificateFiles | None:
    """The server's certificate and key, and the authorities of its clients; None if it serves without TLS.

    Raises:
        FieldError: a file cannot be read, or is invalid.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    key, cert, client_ca = config.tls_key, config.tls_cert, config.tls_client_ca

    def read() -> grpc.ServerCertificateConfiguration:
        check_pair(cert, key, "tls_cert")
        pair = (read_file(key, "tls_key"), read_file(cert, "tls_cert"))
        authorities = None if client_ca is None else read_authorities(client_ca, "tls_client_ca")
        return grpc.ssl_server_certificate_configuration([pair], authorities)

    paths = (key, cert) if client_ca is None else (key, cert, client_ca)
    return WatchedFiles(paths, read)


def server_credentials(files: CertificateFiles, *, verify_clients: bool) -> grpc.ServerCredentials:
    """Credentials for one server, whose new connections use changed files. Another server needs its own.

    Args:
        files: from `certificate_files`.
        verify_clients: accept only clients with a certificate that the authorities in the files signed.
    """
    used = files.current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal used
        before, used = used, files.current()
        return None if used is before else used

    # gRPC takes None for no change, which its type stubs do not say.
    return grpc.dynamic_ssl_server_credentials(used, changed, verify_clients)  # pyright: ignore[reportArgumentType]


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
    token = read_file(path, "token_file").strip()
    if len(token) < MIN_TOKEN_BYTES:
        raise FieldError(
            "token_file",
            f"the token in {path} has {len(token)} characters; at least {MIN_TOKEN_BYTES} are needed: "
            "create one with openssl rand -hex 32",
        )
    return token


def check_certificate(auth_context: Mapping[str, Iterable[bytes]]) -> None:
    """Refuse a caller without a certificate. TLS verifies it; the server's own socket for health checks has no TLS.

    Args:
        auth_context: of the call.

    Raises:
        UnauthenticatedError: the connection has no client's certificate.
    """
    if "x509_pem_cert" not in auth_context:
        raise UnauthenticatedError(
            "this server requires a client's certificate (KVDISTILL_TLS_CERT, KVDISTILL_TLS_KEY); the call had none"
        )


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
