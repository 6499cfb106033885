"""Certificates for tests of TLS."""

from __future__ import annotations

import subprocess
from pathlib import Path


def certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for the loopback address, and its key."""
    directory.mkdir()
    cert, key = directory / "tls.crt", directory / "tls.key"
    request = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost")
    names = ("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    subprocess.run([*request, *names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


class Authority:
    """An authority that signs certificates of clients. `cert`: its own certificate."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self.cert, self._key = directory / "ca.crt", directory / "ca.key"
        request = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=authority")
        subprocess.run([*request, "-keyout", self._key, "-out", self.cert], check=True, capture_output=True)

    def client(self, name: str) -> tuple[Path, Path]:
        """A client's certificate and its key."""
        cert, key, request = (self._directory / f"{name}.{ending}" for ending in ("crt", "key", "csr"))
        make = ("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}")
        subprocess.run([*make, "-keyout", key, "-out", request], check=True, capture_output=True)
        sign = ("openssl", "x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self._key, "-CAcreateserial")
        subprocess.run([*sign, "-days", "2", "-out", cert], check=True, capture_output=True)
        return cert, key
