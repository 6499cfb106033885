"""The gRPC core's arguments for teacher servers and their clients. The core ignores a name that it does not know."""

from __future__ import annotations

# Servers without arguments of their own cut a connection at the third ping that comes within 300 s of the one before
# it, while they send nothing. At this interval no ping comes too early.
TOLERATED_PING_INTERVAL_S = 300.0
SHORTEST_PING_INTERVAL_S = 5.0

ChannelArguments = list[tuple[str, int]]


def server_arguments(max_request_bytes: int) -> ChannelArguments:
    """What teacher servers set: clients may ping every 4 s for as long as a call sends nothing."""
    return [
        ("grpc.max_receive_message_length", max_request_bytes),
        # Two servers on one port would each get half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 4000),
        ("grpc.keepalive_permit_without_calls", 1),
        # The server notices clients that vanished, whose streams would keep their window.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


def client_arguments(max_frame_bytes: int, timeout_s: float) -> ChannelArguments:
    """What clients set.

    A silent call is never cut for its pings, also by a server with gRPC's defaults: a ping after half of the request's
    timeout leaves room for the two pings with which the core may measure bandwidth. A peer that vanished is noticed
    after that time plus 3 s, or plus 10 s if such a ping was under way.

    Args:
        max_frame_bytes: the largest message to receive.
        timeout_s: the longest time that a call may be silent.
    """
    ping_interval_s = min(max(timeout_s / 2, SHORTEST_PING_INTERVAL_S), TOLERATED_PING_INTERVAL_S)
    return [
        ("grpc.max_receive_message_length", max_frame_bytes),
        # A connection of its own: one does about 1 GB/s, and equal channels of a process would share it.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", round(1000 * ping_interval_s)),
        ("grpc.keepalive_timeout_ms", 3000),
        # A ping that measures bandwidth may be on its way already; then no keepalive ping is sent until it times out.
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 3000),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
