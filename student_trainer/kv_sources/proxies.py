"""HTTP proxies of the environment. gRPC would use them for every connection, even within the machine."""

from __future__ import annotations

import ipaddress
import os

# gRPC's own variable asks for a proxy. The others are set on many machines for browsers and package managers.
ASKS_FOR_PROXY = "grpc_proxy"
_COMMON = ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


def uses_proxy(endpoint: str) -> bool:
    """Whether to connect to HOST:PORT through a proxy: if `grpc_proxy` is set, and never within the machine."""
    return bool(os.environ.get(ASKS_FOR_PROXY)) and not is_loopback(endpoint)


def proxy_note(endpoint: str) -> str:
    """The end of the message that HOST:PORT does not answer: the variable that may be the reason, or nothing."""
    if uses_proxy(endpoint):
        return f" (through the proxy that {ASKS_FOR_PROXY} names; no_grpc_proxy lists hosts to reach without it)"
    name = next((name for name in _COMMON if os.environ.get(name)), None)
    if name is None or is_loopback(endpoint):
        return ""
    return f" (connected directly, although {name} is set; {ASKS_FOR_PROXY} makes teachers use a proxy)"


def host_of(endpoint: str) -> str:
    """The host of HOST:PORT, without the brackets of an IPv6 address."""
    return endpoint.rpartition(":")[0].strip("[]")


def is_loopback(endpoint: str) -> bool:
    """Whether HOST:PORT is an address within the machine."""
    host = host_of(endpoint)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
