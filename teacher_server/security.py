"""Who may call a teacher server: a certificate for callers to know it by, and a token to know them by."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from pathlib import Path

import grpc

from kvcore.errors import FieldError, KVDistillError
from teacher_server.config import ServeConfig


class UnauthenticatedError(KVDistillError):
    """The caller did not show the server's token."""


def server_credentials(config: ServeConfig) -> grpc.ServerCredentials | None:
    """The server's certificate and key; None where it speaks plain gRPC.

    Raises:
        FieldError: a file cannot be read.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    pair = (_content(config.tls_key, "tls_key"), _content(config.tls_cert, "tls_cert"))
    return grpc.ssl_server_credentials([pair])


def read_token(config: ServeConfig) -> bytes | None:
    """What callers have to show; None where anybody may call.

    Raises:
        FieldError: the file cannot be read, or is empty.
    """
    if config.token_file is None:
        return None
    token = _content(config.token_file, "token_file").strip()
    if not token:
        raise FieldError("token_file", f"{config.token_file} is empty")
    return token


def check_token(token: bytes | None, metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Refuses a caller without the token, in a time that tells nothing of it.

    Raises:
        UnauthenticatedError: it is missing or another one.
    """
    if token is None:
        return
    shown = dict(metadata).get("authorization", "")
    given = shown if isinstance(shown, bytes) else shown.encode()
    if not hmac.compare_digest(given, b"Bearer " + token):
        raise UnauthenticatedError("this server asks for a token (KVDISTILL_TOKEN_FILE), and got none or another one")


def _content(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FieldError(field, f"cannot read {path}: {error.strerror}") from error
