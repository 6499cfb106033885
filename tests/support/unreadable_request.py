"""A request that gRPC's asyncio server cannot parse: its path contains 0xff, which is not UTF-8."""

from __future__ import annotations

import socket
import ssl

_SETTINGS = 0x4
_HEADERS, _END_OF_HEADERS_AND_STREAM = 0x1, 0x5


def send_unreadable_request(port: int, *, tls: bool = False) -> socket.socket:
    """Send the request over HTTP/2 without a token; the connection stays open until the caller closes it."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        connection = context.wrap_socket(connection)
    headers = {b":path": b"/a/\xff", b":authority": b"x", b"te": b"trailers", b"content-type": b"application/grpc"}
    # 0x83 and 0x86 are HPACK's `:method: POST` and `:scheme: http`; the other headers are literals without indexing.
    block = b"\x83\x86" + b"".join(b"\0" + _sized(name) + _sized(value) for name, value in headers.items())
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    request = _frame(_HEADERS, _END_OF_HEADERS_AND_STREAM, 1, block)
    connection.sendall(preface + _frame(_SETTINGS, 0, 0, b"") + request)
    return connection


def _sized(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
