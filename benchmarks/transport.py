"""Compares what it costs to send the same frames to another process of this machine in different ways.

Prints one JSON object as its last line, with one entry in `sizes` for each size of frames. A server process streams
frames of equal size; this process reads them, and reads every byte once. The arms take turns, and medians over the
rounds are reported: MB/s at the client, and CPU seconds of client and server per GB.

- `identity`: what kvdistill does between machines: gRPC on loopback, and frames whose bytes pass through without
  protobuf objects.
- `identity_unix`: the same on a unix socket.
- `protobuf`: gRPC on loopback with protobuf objects.
- `shared_memory`: what kvdistill does on one machine: as `identity`, but bodies of at least 256 KiB that find a free
  slot go through shared memory.
- `flight`: Arrow Flight on loopback.
- `socket`: a plain TCP socket on loopback.

`ratios` are medians of the ratios within a round: CPU of `identity` over that of another arm.

Examples:
  python -m benchmarks.transport
  python -m benchmarks.transport --frame-bytes 262144 4194304 --megabytes 512 --rounds 9
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import transport_arms as arms

# Linux keeps files of this folder in memory.
IN_MEMORY = Path("/dev/shm")  # noqa: S108  the folder in it has a random name and is this user's alone
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over the stream."""

    megabytes_per_s: float
    cpu_s_per_gb: float


def serve(frame_bytes: int, folder: Path) -> None:
    """Serves all arms until standard input closes; prints their addresses as the first line."""
    body = os.urandom(frame_bytes)
    server, addresses = arms.serve_grpc(body, folder)
    with arms.FlightServer(body) as flight_server:
        addresses |= arms.serve_socket(body) | {"flight": flight_server.port}
        sys.stdout.write(json.dumps(addresses) + "\n")
        sys.stdout.flush()
        sys.stdin.read()
    server.stop(None).wait()


@contextmanager
def server_process(frame_bytes: int, folder: str) -> Iterator[tuple[psutil.Process, arms.Addresses]]:
    """Runs the server in a separate process; yields it and its addresses."""
    flags = ["--serve", folder, "--frame-bytes", str(frame_bytes)]
    command = [sys.executable, "-m", "benchmarks.transport", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield psutil.Process(process.pid), json.loads(process.stdout.readline())


def measure(read: arms.ReadFrames, server: psutil.Process, frames: int, frame_bytes: int) -> Round:
    """Measures one stream of `frames` frames."""
    cpu_before = cpu_seconds(server)
    started = time.perf_counter()
    size = read(frames)
    elapsed = time.perf_counter() - started
    assert size == frames * frame_bytes, f"{size} bytes arrived"
    return Round(size / 1e6 / elapsed, (cpu_seconds(server) - cpu_before) / (size / 1e9))


def cpu_seconds(server: psutil.Process) -> float:
    """CPU time of this process and the server's so far."""
    times = server.cpu_times()
    return time.process_time() + times.user + times.system


def run(frame_bytes: int, megabytes: int, rounds: int) -> dict[str, object]:
    """Measures all arms in turn; the first round is warm-up."""
    frames = max(1, megabytes * 1_000_000 // frame_bytes)
    measured: dict[str, list[Round]] = {}
    with (
        tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as folder,
        server_process(frame_bytes, folder) as (server, addresses),
        arms.readers(addresses, frame_bytes) as readers,
    ):
        for number in range(rounds + 1):
            for arm, read in readers.items():
                one = measure(read, server, frames, frame_bytes)
                if number:
                    measured.setdefault(arm, []).append(one)
    return {
        "frame_bytes": frame_bytes,
        "megabytes_per_round": round(frames * frame_bytes / 1e6, 1),
        "rounds": rounds,
        **{arm: medians(results) for arm, results in measured.items()},
        "ratios": {
            f"identity_over_{arm}": ratio(measured["identity"], results)
            for arm, results in measured.items()
            if arm != "identity"
        },
    }


def ratio(some: Sequence[Round], others: Sequence[Round]) -> float:
    """The median ratio of CPU time within a round."""
    pairs = zip(some, others, strict=True)
    return round(statistics.median(one.cpu_s_per_gb / other.cpu_s_per_gb for one, other in pairs), 3)


def medians(results: Sequence[Round]) -> dict[str, float]:
    """The medians of one arm."""
    return {
        "megabytes_per_s": round(statistics.median(result.megabytes_per_s for result in results), 1),
        "cpu_s_per_gb": round(statistics.median(result.cpu_s_per_gb for result in results), 3),
    }


def main() -> None:
    """Parses the arguments, runs the benchmark and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--frame-bytes", type=int, nargs="+", default=[1 << 16, 1 << 20], help="bytes of a frame's body"
    )
    parser.add_argument("--megabytes", type=int, default=256, help="payload per round")
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.frame_bytes[0], arguments.serve)
        return
    sizes = [run(frame_bytes, arguments.megabytes, arguments.rounds) for frame_bytes in arguments.frame_bytes]
    sys.stdout.write(json.dumps({"benchmark": "transport", "sizes": sizes}) + "\n")


if __name__ == "__main__":
    main()
