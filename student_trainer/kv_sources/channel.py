"""How teachers are reached: without encryption, or over TLS with a token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvcore.errors import FieldError
from student_trainer.launching.transport_variables import TLS_CA, TOKEN_FILE


@dataclass(frozen=True, slots=True)
class Transport:
    """The files that TLS needs.

    Args:
        tls_ca: PEM file with the certificate that the servers are known by; None: no TLS.
        token_file: holds what the servers expect of their callers; needs TLS.
        names: what errors call these two.
    """

    tls_ca: str | Path | None
    token_file: str | Path | None
    names: tuple[str, str] = ("tls_ca", "token_file")

    def open_channel(self, endpoint: str, options: Sequence[tuple[str, int]]) -> grpc.Channel:
        """A channel to `host:port`.

        Raises:
            FieldError: a file cannot be read, or a token would go without TLS.
        """
        ca_name, token_name = self.names
        token = self._token()
        if not self.tls_ca:
            if token is not None:
                raise FieldError(token_name, f"a token goes over TLS alone; set {ca_name} to the servers' certificate")
            return grpc.insecure_channel(endpoint, options=options)
        credentials = grpc.ssl_channel_credentials(_content(self.tls_ca, ca_name))
        if token is not None:
            caller = grpc.access_token_call_credentials(token)
            credentials = grpc.composite_channel_credentials(credentials, caller)
        return grpc.secure_channel(endpoint, credentials, options=options)

    def _token(self) -> str | None:
        if not self.token_file:
            return None
        name = self.names[1]
        token = _content(self.token_file, name).decode(errors="replace").strip()
        if not token or not token.isascii():
            raise FieldError(name, f"{self.token_file} holds no token of ASCII characters")
        return token


def transport_from_environment() -> Transport:
    """What the two environment variables say."""
    return Transport(os.environ.get(TLS_CA), os.environ.get(TOKEN_FILE), (TLS_CA, TOKEN_FILE))


def _content(path: str | Path, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FieldError(name, f"cannot read {path}: {error.strerror}") from error
