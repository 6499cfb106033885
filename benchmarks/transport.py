"""Compares the transport cost of frames with identity serialisers and with protobuf objects, over loopback.

Prints one JSON object as its last line. A server process streams frames of equal size; this process reads them. The two
arms take turns, and medians over the rounds are reported: MB/s at the client, and CPU seconds of client and server per
GB.

Examples:
  python -m benchmarks.transport
  python -m benchmarks.transport --frame-bytes 262144 --megabytes 512 --rounds 9
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from grpc.experimental import ChannelOptions

from kvcore.wire.frames import pack_frame, unpack_frame
from protos import kv_cache_pb2 as pb

ARMS = ("identity", "protobuf")
HEADER = {"v": 1, "request": "0" * 32, "seq": 0, "xxh3": 0, "records": [{"kind": "more", "index": 0}]}
HEADER_ALLOWANCE = 1 << 20
ROOT = Path(__file__).resolve().parent.parent

ReadFrame = Callable[[bytes], int]


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over the stream."""

    megabytes_per_s: float
    cpu_s_per_gb: float


def serve(frame_bytes: int) -> None:
    """Serves both arms until standard input closes; prints the port as the first line."""
    body = os.urandom(frame_bytes)

    def identity(request: bytes, _context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in range(int(request)):
            yield pack_frame(HEADER, body)

    def protobuf(request: bytes, _context: grpc.ServicerContext) -> Iterator[pb.KVFrame]:
        header = unpack_frame_header()
        for _ in range(int(request)):
            yield pb.KVFrame(header=header, body=body)

    server = grpc.server(ThreadPoolExecutor(2))
    handlers = {
        "identity": grpc.unary_stream_rpc_method_handler(identity),
        "protobuf": grpc.unary_stream_rpc_method_handler(protobuf, response_serializer=pb.KVFrame.SerializeToString),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.stop(None).wait()


def unpack_frame_header() -> bytes:
    """The serialised header of every frame."""
    return pb.KVFrame.FromString(pack_frame(HEADER, b"")).header


@contextmanager
def server_process(frame_bytes: int) -> Iterator[tuple[psutil.Process, int]]:
    """Runs the server in a separate process; yields it and its port."""
    command = [sys.executable, "-m", "benchmarks.transport", "--serve", "--frame-bytes", str(frame_bytes)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield psutil.Process(process.pid), int(process.stdout.readline())


def read_identity(data: bytes) -> int:
    """Reads a frame as the student does: the body is a view of the received bytes."""
    return len(unpack_frame(data)[1])


def read_protobuf(data: bytes) -> int:
    """Reads a frame as a generated client does."""
    return len(pb.KVFrame.FromString(data).body)


def measure(arm: str, channel: grpc.Channel, server: psutil.Process, frames: int) -> Round:
    """Measures one stream of `frames` frames."""
    read: ReadFrame = read_identity if arm == "identity" else read_protobuf
    call = channel.unary_stream(f"/bench/{arm}")
    cpu_before = cpu_seconds(server)
    started = time.perf_counter()
    size = sum(read(data) for data in call(str(frames).encode()))
    elapsed = time.perf_counter() - started
    return Round(size / 1e6 / elapsed, (cpu_seconds(server) - cpu_before) / (size / 1e9))


def cpu_seconds(server: psutil.Process) -> float:
    """CPU time of this process and the server's so far."""
    times = server.cpu_times()
    return time.process_time() + times.user + times.system


def run(frame_bytes: int, megabytes: int, rounds: int) -> dict[str, object]:
    """Measures both arms in turn; the first round is warm-up."""
    frames = max(1, megabytes * 1_000_000 // frame_bytes)
    measured: dict[str, list[Round]] = {arm: [] for arm in ARMS}
    options = [
        ("grpc.max_receive_message_length", frame_bytes + HEADER_ALLOWANCE),
        (ChannelOptions.SingleThreadedUnaryStream, 1),
    ]
    with (
        server_process(frame_bytes) as (server, port),
        grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel,
    ):
        for _ in range(rounds + 1):
            for arm in ARMS:
                measured[arm].append(measure(arm, channel, server, frames))
    return {
        "frame_bytes": frame_bytes,
        "megabytes_per_round": round(frames * frame_bytes / 1e6, 1),
        "rounds": rounds,
        **{arm: medians(results[1:]) for arm, results in measured.items()},
    }


def medians(results: list[Round]) -> dict[str, float]:
    """The medians of one arm."""
    return {
        "megabytes_per_s": round(statistics.median(result.megabytes_per_s for result in results), 1),
        "cpu_s_per_gb": round(statistics.median(result.cpu_s_per_gb for result in results), 3),
    }


def main() -> None:
    """Parses the arguments, runs the benchmark and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frame-bytes", type=int, default=1 << 20, help="bytes of a frame's body")
    parser.add_argument("--megabytes", type=int, default=256, help="payload per round")
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.frame_bytes)
        return
    sys.stdout.write(json.dumps(run(arguments.frame_bytes, arguments.megabytes, arguments.rounds)) + "\n")


if __name__ == "__main__":
    main()
