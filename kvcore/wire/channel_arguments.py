"""gRPC channel arguments of teacher servers and their clients. gRPC ignores unknown names."""

from __future__ import annotations

# While a gRPC server with default settings sends nothing, it closes a connection at the third ping that comes within
# 300 s of the previous one. At this interval no ping is too early.
TOLERATED_PING_INTERVAL_S = 300.0
SHORTEST_PING_INTERVAL_S = 5.0

ChannelArguments = list[tuple[str, int]]

# A server's limits for callers that it has not authenticated yet.
MAX_CONNECTIONS = 512
MAX_METADATA_BYTES = 8192
UNREAD_BYTES = 1 << 18
HANDSHAKE_MS = 10_000
IDLE_CONNECTION_MS = 300_000


# Otherwise gRPC connects through the proxy that the environment names, even within the machine.
DIRECT = ("grpc.enable_http_proxy", 0)
THROUGH_PROXY = ("grpc.enable_http_proxy", 1)


def server_arguments(max_request_bytes: int, max_streams: int) -> ChannelArguments:
    """Returns the arguments of teacher servers: limits for callers; pings every 4 s are allowed in silent calls.

    Args:
        max_request_bytes: the largest message to receive.
        max_streams: the most concurrent calls of one connection.
    """
    return [
        ("grpc.max_receive_message_length", max_request_bytes),
        # Otherwise two servers could share a port, and each would get half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 4000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Detects clients that vanished, whose streams would otherwise keep their window.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        ("grpc.max_concurrent_streams", max_streams),
        # If the two differed, gRPC would refuse some calls at random.
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        # How much gRPC buffers of an unread request. By default this grows with the size of other requests.
        ("grpc.http2.lookahead_bytes", UNREAD_BYTES),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", IDLE_CONNECTION_MS),
    ]


def client_arguments(max_frame_bytes: int, timeout_s: float) -> ChannelArguments:
    """Returns the arguments of clients.

    Servers, including those with gRPC's defaults, never close a silent call because of its pings: a ping after half of
    the timeout leaves room for the two pings with which gRPC may measure bandwidth. A peer that vanished is detected
    after that time plus 3 s, or plus 10 s if such a ping was in progress.

    Args:
        max_frame_bytes: the largest message to receive.
        timeout_s: the longest time that a call may be silent.
    """
    ping_interval_s = min(max(timeout_s / 2, SHORTEST_PING_INTERVAL_S), TOLERATED_PING_INTERVAL_S)
    return [
        ("grpc.max_receive_message_length", max_frame_bytes),
        # Otherwise equal channels of a process share one connection, which is limited to about 1 GB/s.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", round(1000 * ping_interval_s)),
        ("grpc.keepalive_timeout_ms", 3000),
        # While a ping that measures bandwidth is in progress, no keepalive ping is sent until it times out.
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 3000),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
