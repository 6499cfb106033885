"""Addresses of servers: HOST:PORT."""

from __future__ import annotations

LARGEST_PORT = 65535


def check_endpoint(text: str) -> str:
    """Returns `text` if it is HOST:PORT with a port to connect to. gRPC would use the last 16 bits of a larger number.

    Raises:
        ValueError: says what is wrong, without the field.
    """
    host, _, port = text.rpartition(":")
    if not host or "/" in host or text.split() != [text] or not (port.isascii() and port.isdecimal()):
        raise ValueError("expected HOST:PORT")
    if len(port) > len(str(LARGEST_PORT)) or not 1 <= int(port) <= LARGEST_PORT:
        raise ValueError(f"a port is 1 to {LARGEST_PORT}")
    return text
