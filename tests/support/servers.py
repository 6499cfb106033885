"""Teacher servers for tests and benchmarks: real `kvdistill serve` processes, and clients that talk to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import httpx
import psutil
from grpc_health.v1 import health_pb2

from kvcore.plan import KVPlan
from kvcore.types import EncodedSampleKV, Sample, TeacherInfo
from kvcore.wire import messages
from kvcore.wire.stream_reader import RefusedSample, StreamReader
from protos import kv_cache_pb2 as pb

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 90.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.05

Outcome = EncodedSampleKV | RefusedSample


class ServerStartError(RuntimeError):
    """The server ended, or took too long, before it was ready."""


@dataclass
class TeacherProcess:
    """A `kvdistill serve` process and its addresses."""

    process: subprocess.Popen[bytes]
    log_path: Path
    grpc_port: int = 0
    http_port: int = 0

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http_port}{path}"

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url(path), timeout=10)

    def info(self) -> dict[str, Any]:
        return self.get("/info").json()

    def memory_mb(self) -> float:
        return psutil.Process(self.pid).memory_info().rss / 2**20

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The log's JSON lines; other lines, such as a library's, are skipped."""
        found: list[dict[str, Any]] = []
        for line in self.log_path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                event = json.loads(line)
                if isinstance(event, dict) and name in (None, event.get("event")):
                    found.append(event)
        return found

    def wait_event(self, name: str, seconds: float = START_SECONDS) -> dict[str, Any]:
        """Wait for a log event.

        Raises:
            ServerStartError: the process ended, or the event did not come in time.
        """
        give_up_at = time.monotonic() + seconds
        while True:
            ended = self.process.poll()
            if found := self.events(name):
                return found[0]
            if ended is not None or time.monotonic() > give_up_at:
                what = "still runs" if ended is None else f"ended with {ended}"
                log = self.log_path.read_text(encoding="utf-8")[-4000:]
                raise ServerStartError(f"no event '{name}'; the server {what}. Its log ends:\n{log}")
            time.sleep(POLL_SECONDS)

    def wait_ready(self, seconds: float = START_SECONDS) -> TeacherProcess:
        """Wait until the server accepts requests."""
        ready = self.wait_event("ready", seconds)
        self.grpc_port, self.http_port = ready["grpc_port"], ready["http_port"]
        return self

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Wait until the process ends, and return its exit status."""
        return self.process.wait(seconds)

    def stop(self, seconds: float = STOP_SECONDS) -> int:
        """Stop the server with SIGTERM, or with SIGKILL if that takes too long."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            return self.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.wait()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.wait()


def start_teacher(
    model: str | Path, log_path: Path, *, engine: str = "hf", grpc_port: int = 0, http_port: int = 0, **options: object
) -> TeacherProcess:
    """Start a server and return at once; `options` are flags of `kvdistill serve` with underscores."""
    settings = {"engine": engine, "grpc_port": grpc_port, "http_port": http_port, **options}
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "kvdistill", "serve", "--model", str(model), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
    return TeacherProcess(process, log_path)


@contextlib.contextmanager
def running_teacher(model: str | Path, log_path: Path, **options: Any) -> Iterator[TeacherProcess]:
    """Run a server inside the block, which starts when it is ready."""
    teacher = start_teacher(model, log_path, **options)
    try:
        yield teacher.wait_ready()
    finally:
        teacher.stop()


@dataclass
class TeacherClient:
    """A plain client of one endpoint, for one thread."""

    endpoint: str
    channel: grpc.Channel = field(init=False)
    info: TeacherInfo = field(init=False)

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(self.endpoint, options=[("grpc.max_receive_message_length", 64 << 20)])
        self._describe = self.channel.unary_unary(
            "/kvcache.v1.TeacherKV/Describe",
            request_serializer=pb.DescribeRequest.SerializeToString,
            response_deserializer=pb.DescribeResponse.FromString,
        )
        self._stream = self.channel.unary_stream(
            "/kvcache.v1.TeacherKV/StreamKV", request_serializer=pb.KVRequest.SerializeToString
        )

    def __enter__(self) -> Self:
        self.info = messages.info_from_proto(self._describe(pb.DescribeRequest(), timeout=30, wait_for_ready=True))
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def call(self, plan: KVPlan, samples: Sequence[Sample], request_id: str = "", timeout: float | None = 60.0) -> Any:
        """The raw stream of frames."""
        return self._stream(kv_request(plan, samples, request_id), timeout=timeout)

    def fetch(self, plan: KVPlan, samples: Sequence[Sample], timeout: float = 60.0) -> list[Outcome]:
        """Every sample's outcome, in the order of the request."""
        request_id = uuid.uuid4().hex
        reader = StreamReader(request_id, plan, samples, self.info)
        outcomes: dict[int, Outcome] = {}
        for frame in self.call(plan, samples, request_id, timeout):
            outcomes.update(reader.feed(frame))
        reader.finish()
        return [outcomes[index] for index in range(len(samples))]


def kv_request(plan: KVPlan, samples: Sequence[Sample], request_id: str = "") -> pb.KVRequest:
    """A request as a protobuf message."""
    return pb.KVRequest(
        request_id=request_id or uuid.uuid4().hex,
        plan=messages.plan_to_proto(plan),
        samples=[messages.sample_to_proto(sample) for sample in samples],
    )


def token_samples(count: int, tokens: int, prefix: str = "n") -> list[Sample]:
    """Different samples with `tokens` tokens each."""
    return [Sample(f"{prefix}{i}", token_ids=tuple((i * 31 + j) % 250 for j in range(tokens))) for i in range(count)]


@dataclass(frozen=True)
class Refusal:
    """The status of a failed call."""

    code: grpc.StatusCode
    details: str
    pushback_ms: int | None


def refused(request: Callable[[], object]) -> Refusal:
    """Make a call that has to fail, and return its status."""
    try:
        request()
    except grpc.RpcError as error:
        call: Any = error
        pushback = dict(call.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
        return Refusal(call.code(), call.details() or "", None if pushback is None else int(pushback))
    raise AssertionError("the call succeeded")


def health(endpoint: str, service: str = "kvcache.v1.TeacherKV") -> int:
    """The status from grpc.health.v1, a `HealthCheckResponse.ServingStatus`."""
    with grpc.insecure_channel(endpoint) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        return check(health_pb2.HealthCheckRequest(service=service), timeout=10).status


def wait_until(condition: Callable[[], bool], seconds: float = 60.0, every_s: float = 0.02) -> None:
    """Poll until a condition holds that another process or thread will meet."""
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, "it did not come to that"
        time.sleep(every_s)
