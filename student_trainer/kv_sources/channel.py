"""gRPC channels to teachers: plain, or over TLS with a token."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvcore.certificates import check_pair, read_authorities, read_file
from kvcore.errors import FieldError
from kvcore.watched_files import WatchedFiles
from kvcore.wire.channel_arguments import DIRECT, THROUGH_PROXY
from student_trainer.kv_sources.proxies import uses_proxy
from student_trainer.launching.transport_variables import TLS_CA, TLS_CERT, TLS_KEY, TOKEN_FILE

# What gRPC puts before the reason why it cannot connect.
_ADDRESS = re.compile(r"^failed to connect to all addresses; last error: [A-Z_]+: (ipv4|ipv6|unix):\S+: ")
# How gRPC says that a server ended a new connection, as it does after a failed TLS handshake.
_CLOSED_BY_SERVER = ("Socket closed", "Connection reset by peer")


@dataclass(frozen=True, slots=True)
class Names:
    """The names of the settings in errors."""

    tls_ca: str = "tls_ca"
    token_file: str = "token_file"  # noqa: S105  a name, not a secret
    tls_cert: str = "tls_cert"
    tls_key: str = "tls_key"


@dataclass(frozen=True, slots=True)
class Transport:
    """The files for TLS and authentication.

    Args:
        tls_ca: PEM file with the certificate that verifies the servers; without it, channels are plain.
        token_file: file with the token that the servers expect; needs TLS.
        tls_cert: PEM file with the client's own certificate, for servers that ask for one; needs TLS.
        tls_key: PEM file with the private key of `tls_cert`.
        names: the names of these settings in errors.
    """

    tls_ca: str | Path | None
    token_file: str | Path | None
    tls_cert: str | Path | None = None
    tls_key: str | Path | None = None
    names: Names = Names()

    def credentials(self) -> WatchedFiles[grpc.ChannelCredentials] | None:
        """The credentials of channels, which change with the files; None for plain channels.

        Raises:
            FieldError: a file cannot be read or is invalid, or a token or a client's certificate is set without TLS.
        """
        names = self.names
        if (self.tls_cert is None) != (self.tls_key is None):
            missing, given = (names.tls_key, names.tls_cert) if self.tls_cert else (names.tls_cert, names.tls_key)
            raise FieldError(missing, f"set it too: {given} is set, and a client's certificate needs its private key")
        if not self.tls_ca:
            if self.token_file:
                problem = f"a token is only sent over TLS; set {names.tls_ca} to the servers' certificate"
                raise FieldError(names.token_file, problem)
            if self.tls_cert:
                problem = f"a client's certificate needs TLS; set {names.tls_ca} to the servers' certificate"
                raise FieldError(names.tls_cert, problem)
            return None
        files = [Path(path).expanduser() for path in (self.tls_ca, self.tls_cert, self.tls_key) if path]
        token = _TokenHeader(Path(self.token_file).expanduser(), names.token_file) if self.token_file else None
        return WatchedFiles(files, lambda: self._read(files, token))

    def note(self, details: str) -> str:
        """The end of the message that a server does not answer: the setting that may be the reason, or nothing.

        Args:
            details: gRPC's reason why a first call failed.
        """
        names = self.names
        if "CERTIFICATE_VERIFY_FAILED" in details:
            return f" ({names.tls_ca}, {self.tls_ca}, does not verify the server's certificate and address)"
        if "WRONG_VERSION_NUMBER" in details:
            return f" (the server seems not to use TLS; then unset {names.tls_ca})"
        if not any(ending in details for ending in _CLOSED_BY_SERVER):
            return ""
        if not self.tls_ca:
            return f" (the server may use TLS; then set {names.tls_ca} to its certificate)"
        if not self.tls_cert:
            return f" (the server may ask for a client's certificate; then set {names.tls_cert} and {names.tls_key})"
        return (
            f" (the authorities in the server's --tls-client-ca may not have signed {names.tls_cert}, {self.tls_cert})"
        )

    def _read(self, files: Sequence[Path], token: _TokenHeader | None) -> grpc.ChannelCredentials:
        names, authorities = self.names, read_authorities(files[0], self.names.tls_ca)
        if len(files) == 1:
            credentials = grpc.ssl_channel_credentials(authorities)
        else:
            _, cert, key = files
            check_pair(cert, key, names.tls_cert)
            own = {"private_key": read_file(key, names.tls_key), "certificate_chain": read_file(cert, names.tls_cert)}
            credentials = grpc.ssl_channel_credentials(authorities, **own)
        if token is not None:
            credentials = grpc.composite_channel_credentials(credentials, grpc.metadata_call_credentials(token))
        return credentials


def open_channel(
    endpoint: str, credentials: grpc.ChannelCredentials | None, options: Sequence[tuple[str, int]]
) -> grpc.Channel:
    """A channel to `host:port`, through a proxy only if `grpc_proxy` is set.

    Args:
        endpoint: host:port.
        credentials: None for a plain channel.
        options: gRPC's channel arguments.
    """
    options = [*options, THROUGH_PROXY if uses_proxy(endpoint) else DIRECT]
    if credentials is None:
        return grpc.insecure_channel(endpoint, options=options)
    return grpc.secure_channel(endpoint, credentials, options=options)


class _TokenHeader(grpc.AuthMetadataPlugin):
    """Adds the token of a file to every call, also after the file has changed."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._token = WatchedFiles((path,), self._read)

    def __call__(self, _context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        callback((("authorization", f"Bearer {self._token.current()}"),), None)

    def _read(self) -> str:
        token = read_file(self._path, self._name).decode(errors="replace").strip()
        if not token or not token.isascii():
            raise FieldError(self._name, f"{self._path} holds no token of ASCII characters")
        return token


def transport_from_environment() -> Transport:
    """The transport that the environment variables set."""
    files = (os.environ.get(name) or None for name in (TLS_CA, TOKEN_FILE, TLS_CERT, TLS_KEY))
    return Transport(*files, names=Names(TLS_CA, TOKEN_FILE, TLS_CERT, TLS_KEY))


def without_address(details: str) -> str:
    """The reason in gRPC's details of a failed connection, without the address, which errors already name."""
    return _ADDRESS.sub("", details)
