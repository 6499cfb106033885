"""The two sides of each transport that `benchmarks.transport` compares: a server's and a client's.

All clients read every byte of every frame once, as a client does that checks a frame's hash. Nobody keeps a frame.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pyarrow as pa
import xxhash
from grpc.experimental import ChannelOptions
from pyarrow import flight

from kvcore.wire.frames import pack_frame, unpack_frame
from kvcore.wire.shared_memory import MAX_SLOTS, Layout, OpenedSlots, SharedSlots
from protos import kv_cache_pb2 as pb
from teacher_server.requests.shared_frames import with_body_in

HEADER = {"v": 1, "request": "0" * 32, "seq": 0, "xxh3": 0, "records": [{"kind": "more", "index": 0}]}
HEADER_ALLOWANCE = 1 << 20

Addresses = dict[str, Any]
# Reads a number of frames; returns the bytes of their bodies.
ReadFrames = Callable[[int], int]


def read_all(body: bytes | bytearray | memoryview) -> int:
    """Reads every byte once; returns their number."""
    xxhash.xxh3_64_intdigest(body)
    return len(body)


def serve_grpc(body: bytes, folder: Path) -> tuple[grpc.Server, Addresses]:
    """Serves the arms of gRPC, on loopback and on a unix socket."""
    header = pb.KVFrame.FromString(pack_frame(HEADER, b"")).header
    slots = SharedSlots(Layout(MAX_SLOTS, len(body)))

    def identity(request: bytes, _context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in range(int(request)):
            yield pack_frame(HEADER, body)

    def protobuf(request: bytes, _context: grpc.ServicerContext) -> Iterator[pb.KVFrame]:
        for _ in range(int(request)):
            yield pb.KVFrame(header=header, body=body)

    def in_memory(request: bytes, _context: grpc.ServicerContext) -> Iterator[bytes]:
        return shared_frames(int(request), body, slots)

    server = grpc.server(ThreadPoolExecutor(2))
    handlers = {
        "identity": grpc.unary_stream_rpc_method_handler(identity),
        "protobuf": grpc.unary_stream_rpc_method_handler(protobuf, response_serializer=pb.KVFrame.SerializeToString),
        "shared_memory": grpc.unary_stream_rpc_method_handler(in_memory),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    unix = f"unix:{folder / 'grpc.sock'}"
    server.add_insecure_port(unix)
    server.start()
    offer = slots.offer().SerializeToString().hex()
    return server, {"tcp": f"127.0.0.1:{port}", "unix": unix, "offer": offer}


def shared_frames(frames: int, body: bytes, slots: SharedSlots) -> Iterator[bytes]:
    """Frames as a server sends them: large bodies in free slots."""
    for _ in range(frames):
        yield with_body_in(slots, pack_frame(HEADER, body))[0]


def serve_socket(body: bytes) -> Addresses:
    """Serves frames on a plain TCP socket: each is its length and its bytes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def work() -> None:
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionError):
                for _ in range(int.from_bytes(connection.recv(8), "little")):
                    frame = pack_frame(HEADER, body)
                    connection.sendall(len(frame).to_bytes(8, "little"))
                    connection.sendall(frame)

    threading.Thread(target=work, daemon=True).start()
    return {"socket": listener.getsockname()[1]}


class FlightServer(flight.FlightServerBase):
    """Serves frames as record batches of one column of bytes."""

    def __init__(self, body: bytes) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._body = body

    def do_get(self, _context: Any, ticket: Any) -> Any:
        """See `FlightServerBase.do_get`."""
        schema = pa.schema([("body", pa.uint8())])

        def batches() -> Iterator[Any]:
            for _ in range(int(ticket.ticket)):
                # A copy, as the other arms make when they pack a frame.
                column = pa.array(np.frombuffer(self._body, dtype=np.uint8).copy())
                yield pa.record_batch([column], schema=schema)

        return flight.GeneratorStream(schema, batches())


def grpc_reader(arm: str, channel: grpc.Channel, slots: OpenedSlots | None = None) -> ReadFrames:
    """Reads frames as the student does, or as a generated client does.

    The student's body is a view of the received bytes, or a copy of its slot.
    """
    read_shared = None if slots is None else slots.read

    def read(frames: int) -> int:
        call = channel.unary_stream(f"/bench/{arm}")(str(frames).encode())
        if arm == "protobuf":
            return sum(read_all(pb.KVFrame.FromString(data).body) for data in call)
        return sum(read_all(unpack_frame(data, read_shared)[1]) for data in call)

    return read


def socket_reader(port: int) -> ReadFrames:
    """Reads frames from a plain TCP socket, each into memory of its own."""

    def read(frames: int) -> int:
        total = 0
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(frames.to_bytes(8, "little"))
            for _ in range(frames):
                frame = _receive(connection, int.from_bytes(_receive(connection, 8), "little"))
                total += read_all(unpack_frame(cast("bytes", frame))[1])
        return total

    return read


def _receive(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    with memoryview(data) as view:
        done = 0
        while done < size:
            count = connection.recv_into(view[done:])
            if not count:
                raise SystemExit("the server closed the socket")
            done += count
    return data


def flight_reader(port: int) -> ReadFrames:
    """Reads record batches with Arrow Flight."""
    client = flight.connect(f"grpc://127.0.0.1:{port}")

    def read(frames: int) -> int:
        reader = client.do_get(flight.Ticket(str(frames).encode()))
        return sum(read_all(memoryview(chunk.data.column(0).buffers()[1])) for chunk in reader)

    return read


@contextlib.contextmanager
def readers(addresses: Addresses, frame_bytes: int) -> Iterator[dict[str, ReadFrames]]:
    """The client's side of every arm."""
    options = [
        ("grpc.max_receive_message_length", frame_bytes + HEADER_ALLOWANCE),
        (ChannelOptions.SingleThreadedUnaryStream, 1),
    ]
    with (
        grpc.insecure_channel(addresses["tcp"], options=options) as tcp,
        grpc.insecure_channel(addresses["unix"], options=options) as unix,
    ):
        offer = pb.OpenMemoryResponse.FromString(bytes.fromhex(addresses["offer"]))
        yield {
            "identity": grpc_reader("identity", tcp),
            "identity_unix": grpc_reader("identity", unix),
            "protobuf": grpc_reader("protobuf", tcp),
            "shared_memory": grpc_reader("shared_memory", tcp, OpenedSlots(offer)),
            "flight": flight_reader(addresses["flight"]),
            "socket": socket_reader(addresses["socket"]),
        }
