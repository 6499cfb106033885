"""The certificate and the token that a job makes for its teacher servers. Does not import torch."""

from __future__ import annotations

import ipaddress
import os
import secrets
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcore.errors import ConfigError
from student_trainer.launching.transport_variables import TLS_CA, TOKEN_FILE

# Teachers may outlive many runs.
_DAYS = 365
_OWN = ("--tls-cert", "--tls-key", "--token-file", "--insecure")


@dataclass(frozen=True, slots=True)
class Credentials:
    """Files, by absolute path: a server's certificate, which signs itself, its private key, and the callers' token."""

    certificate: Path
    key: Path
    token: Path

    @property
    def server_flags(self) -> list[str]:
        """The flags of `kvdistill serve`."""
        files = {"--tls-cert": self.certificate, "--tls-key": self.key, "--token-file": self.token}
        return [part for flag, path in files.items() for part in (flag, str(path))]

    @property
    def variables(self) -> dict[str, str]:
        """The environment of callers."""
        return {TLS_CA: str(self.certificate), TOKEN_FILE: str(self.token)}


def brings_own_access(flags: Iterable[str]) -> bool:
    """Whether flags of `kvdistill serve` say how callers reach the server: with which files, or without any."""
    return any(flag.partition("=")[0].replace("_", "-") in _OWN for flag in flags)


def create_credentials(folder: Path, addresses: Sequence[str], token: Path | None = None) -> Credentials:
    """Creates a certificate for some addresses, and a token, in files that only this user can read.

    Args:
        folder: receives the files; on a disk that all nodes of the job see.
        addresses: host names and IP addresses of the servers.
        token: an existing token to use instead of a new one.

    Raises:
        ConfigError: openssl is missing or failed.
    """
    folder = folder.absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = Credentials(folder / "server.crt", folder / "server.key", (token or folder / "token").absolute())
    settings = folder / "certificate.cnf"
    settings.write_text(_settings(addresses), encoding="ascii")
    made.key.touch(mode=0o600)
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-sha256", "-days", str(_DAYS)]
    command += ["-config", str(settings), "-keyout", str(made.key), "-out", str(made.certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise ConfigError(
            f"openssl cannot make a certificate for the teacher servers ({reason}); install it on this node"
        ) from error
    if token is None:
        create_token(made.token)
    return made


def create_token(path: Path) -> None:
    """Creates a file with a random token, unless the file exists. Several jobs may do so at the same time."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    own.touch(mode=0o600)
    own.write_text(f"{secrets.token_hex(32)}\n", encoding="ascii")
    try:
        path.hardlink_to(own)  # fails if the file exists, and never shows an incomplete one
    except FileExistsError:
        pass
    finally:
        own.unlink()


def _settings(addresses: Sequence[str]) -> str:
    names = ",".join(dict.fromkeys(f"{_kind(address)}:{address}" for address in addresses))
    return f"""[req]
distinguished_name = name
x509_extensions = extensions
prompt = no
[name]
CN = kvdistill
[extensions]
subjectAltName = {names}
basicConstraints = critical,CA:TRUE
extendedKeyUsage = serverAuth
"""


def _kind(address: str) -> str:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return "DNS"
    return "IP"
