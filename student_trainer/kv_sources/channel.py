"""gRPC channels to teachers: plain, or over TLS with a token, as set by two environment variables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import grpc

from kvcore.errors import FieldError
from student_trainer.launching.transport_variables import TLS_CA, TOKEN_FILE


def open_channel(endpoint: str, options: Sequence[tuple[str, int]]) -> grpc.Channel:
    """A channel to `host:port`.

    Raises:
        FieldError: the file named by a variable cannot be read, or a token is set without TLS.
    """
    token = _token()
    authorities = _content(TLS_CA)
    if authorities is None:
        if token is not None:
            raise FieldError(TOKEN_FILE, f"a token goes over TLS alone; set {TLS_CA} to the servers' certificate")
        return grpc.insecure_channel(endpoint, options=options)
    credentials = grpc.ssl_channel_credentials(authorities)
    if token is not None:
        caller = grpc.access_token_call_credentials(token)
        credentials = grpc.composite_channel_credentials(credentials, caller)
    return grpc.secure_channel(endpoint, credentials, options=options)


def _token() -> str | None:
    content = _content(TOKEN_FILE)
    if content is None:
        return None
    token = content.decode(errors="replace").strip()
    if not token or not token.isascii():
        raise FieldError(TOKEN_FILE, f"{os.environ[TOKEN_FILE]} holds no token of ASCII characters")
    return token


def _content(variable: str) -> bytes | None:
    path = os.environ.get(variable)
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FieldError(variable, f"cannot read {path}: {error.strerror}") from error
