"""Where a caller is, from the address that gRPC gives of it."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import unquote

_FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}


def on_this_machine(peer: str) -> bool:
    """Whether a peer has an address of this machine, or uses a unix socket.

    Args:
        peer: as gRPC names it, such as `ipv4:10.0.0.7:41234` or `ipv6:%5B::1%5D:41234`.
    """
    scheme, _, address = peer.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return True
    host = unquote(address).rpartition(":")[0].strip("[]")
    try:
        ipaddress.ip_address(host)
        with socket.socket(_FAMILIES[scheme], socket.SOCK_STREAM) as probe:
            # Only addresses of this machine can be bound.
            probe.bind((host, 0))
    except (OSError, ValueError, KeyError):
        return False
    return True
