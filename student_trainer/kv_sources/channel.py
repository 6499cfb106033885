"""gRPC channels to teachers: plain, or over TLS with a token."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvcore.errors import FieldError
from kvcore.watched_files import WatchedFiles
from kvcore.wire.channel_arguments import DIRECT, THROUGH_PROXY
from student_trainer.kv_sources.proxies import uses_proxy
from student_trainer.launching.transport_variables import TLS_CA, TOKEN_FILE

# What gRPC puts before the reason why it cannot connect.
_ADDRESS = re.compile(r"^failed to connect to all addresses; last error: [A-Z_]+: (ipv4|ipv6|unix):\S+: ")


@dataclass(frozen=True, slots=True)
class Transport:
    """The files for TLS and authentication.

    Args:
        tls_ca: PEM file with the certificate that verifies the servers; without it, channels are plain.
        token_file: file with the token that the servers expect; needs TLS.
        names: the names of these two settings in errors.
    """

    tls_ca: str | Path | None
    token_file: str | Path | None
    names: tuple[str, str] = ("tls_ca", "token_file")

    def open_channel(self, endpoint: str, options: Sequence[tuple[str, int]]) -> grpc.Channel:
        """A channel to `host:port`, through a proxy only if `grpc_proxy` is set.

        Raises:
            FieldError: a file cannot be read, or a token is set without TLS.
        """
        options = [*options, THROUGH_PROXY if uses_proxy(endpoint) else DIRECT]
        ca_name, token_name = self.names
        token = _TokenHeader(Path(self.token_file).expanduser(), token_name) if self.token_file else None
        if not self.tls_ca:
            if token is not None:
                problem = f"a token is only sent over TLS; set {ca_name} to the servers' certificate"
                raise FieldError(token_name, problem)
            return grpc.insecure_channel(endpoint, options=options)
        credentials = grpc.ssl_channel_credentials(_content(self.tls_ca, ca_name))
        if token is not None:
            caller = grpc.metadata_call_credentials(token)
            credentials = grpc.composite_channel_credentials(credentials, caller)
        return grpc.secure_channel(endpoint, credentials, options=options)


class _TokenHeader(grpc.AuthMetadataPlugin):
    """Adds the token of a file to every call, also after the file has changed."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._token = WatchedFiles((path,), self._read)

    def __call__(self, _context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        callback((("authorization", f"Bearer {self._token.current()}"),), None)

    def _read(self) -> str:
        token = _content(self._path, self._name).decode(errors="replace").strip()
        if not token or not token.isascii():
            raise FieldError(self._name, f"{self._path} holds no token of ASCII characters")
        return token


def transport_from_environment() -> Transport:
    """The transport that the two environment variables set."""
    return Transport(os.environ.get(TLS_CA), os.environ.get(TOKEN_FILE), (TLS_CA, TOKEN_FILE))


def _content(path: str | Path, name: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise FieldError(name, f"cannot read {path}: {error.strerror}") from error


def without_address(details: str) -> str:
    """The reason in gRPC's details of a failed connection, without the address, which errors already name."""
    return _ADDRESS.sub("", details)
