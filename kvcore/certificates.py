"""Checks of certificate files. gRPC itself would report invalid ones only on stderr, or not at all."""

from __future__ import annotations

import ssl
from pathlib import Path

from kvcore.errors import FieldError


def read_file(path: Path, field: str) -> bytes:
    """The content of a file.

    Raises:
        FieldError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise FieldError(field, f"cannot read {path}: {error.strerror}") from error


def check_pair(cert: Path, key: Path, field: str) -> None:
    """Refuses files that are not a certificate and its key.

    Raises:
        FieldError: names both files.
    """
    try:
        # A key with a password is refused: nobody is there to type it.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:
        problem = f"{cert} and {key} are not a certificate and its key without a password: {error}"
        raise FieldError(field, problem) from error


def read_authorities(path: Path, field: str) -> bytes:
    """The content of a PEM file with certificates of authorities.

    Raises:
        FieldError: it cannot be read, or holds no certificate.
    """
    content = read_file(path, field)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("ascii", "replace"))
    except (OSError, ValueError) as error:
        raise FieldError(field, f"{path} holds no certificate in PEM format: {error}") from error
    return content
