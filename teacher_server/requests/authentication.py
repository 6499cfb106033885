"""Authentication and TLS: the server's certificate, and the token that callers must present."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from pathlib import Path

import grpc

from kvcore.errors import FieldError, KVDistillError
from teacher_server.config import ServeConfig

MIN_TOKEN_BYTES = 16


class UnauthenticatedError(KVDistillError):
    """The caller did not present the server's token."""


def server_credentials(config: ServeConfig) -> grpc.ServerCredentials | None:
    """The server's certificate and key; None if it serves without TLS.

    Raises:
        FieldError: a file cannot be read.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    pair = (_content(config.tls_key, "tls_key"), _content(config.tls_cert, "tls_cert"))
    return grpc.ssl_server_credentials([pair])


def read_token(config: ServeConfig) -> bytes | None:
    """The token that callers must present; None if no token is required.

    Raises:
        FieldError: the file cannot be read, or the token is too short.
    """
    if config.token_file is None:
        return None
    token = _content(config.token_file, "token_file").strip()
    if len(token) < MIN_TOKEN_BYTES:
        raise FieldError(
            "token_file",
            f"the token in {config.token_file} has {len(token)} characters; at least {MIN_TOKEN_BYTES} are needed: "
            "create one with openssl rand -hex 32",
        )
    return token


def check_token(token: bytes | None, metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Refuse a caller without the token. The comparison takes constant time.

    Raises:
        UnauthenticatedError: the token is missing or wrong.
    """
    if token is None:
        return
    header = dict(metadata).get("authorization", "")
    given = header if isinstance(header, bytes) else header.encode()
    if not hmac.compare_digest(given, b"Bearer " + token):
        raise UnauthenticatedError(
            "this server requires a token (KVDISTILL_TOKEN_FILE); the call had none or a wrong one"
        )


def _content(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FieldError(field, f"cannot read {path}: {error.strerror}") from error
