"""Tests of the limits for unauthenticated callers: memory, open calls, metadata and log lines; real TLS and process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from kvcore.wire.channel_arguments import MAX_METADATA_BYTES
from protos import kv_cache_pb2 as pb
from teacher_server.config import MIB
from teacher_server.monitoring.logs import LINES_AT_ONCE
from teacher_server.requests.connection_limits import MAX_OPEN_REFLECTIONS
from tests.integration.test_secure_transport import SECRET, certificate
from tests.support.servers import TeacherProcess, running_teacher, wait_until

pytestmark = pytest.mark.slow

CALLS, BYTES = 80, 15 * MIB
STREAM_KV, DESCRIBE = "/kvcache.v1.TeacherKV/StreamKV", "/kvcache.v1.TeacherKV/Describe"
CHECK = "/grpc.health.v1.Health/Check"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@pytest.fixture(scope="module")
def cert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("tls") / "own")[0]


@pytest.fixture
def teacher(cert: Path, tmp_path: Path) -> Iterator[TeacherProcess]:
    (tmp_path / "token").write_text(SECRET, encoding="utf-8")
    secrets = {"tls_cert": cert, "tls_key": cert.with_name("tls.key"), "token_file": tmp_path / "token"}
    with running_teacher("fake:layers=2", tmp_path / "log", engine="fake", **secrets) as running:
        yield running


@pytest.fixture
def channel(teacher: TeacherProcess, cert: Path) -> Iterator[grpc.Channel]:
    credentials = grpc.ssl_channel_credentials(cert.read_bytes())
    with grpc.secure_channel(teacher.endpoint, credentials) as opened:
        yield opened


def peak_mb(teacher: TeacherProcess) -> float:
    """The server's peak resident memory."""
    status = Path(f"/proc/{teacher.pid}/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def flood(call: Callable[[int], object], calls: int) -> Counter[grpc.StatusCode]:
    """Make many concurrent calls, and count their statuses."""

    def outcome(number: int) -> grpc.StatusCode:
        try:
            call(number)
        except grpc.RpcError as error:
            failed: Any = error
            return failed.code()
        return grpc.StatusCode.OK

    with ThreadPoolExecutor(calls) as pool:
        return Counter(pool.map(outcome, range(calls)))


@pytest.mark.parametrize(("path", "code"), [(STREAM_KV, "UNAUTHENTICATED"), (CHECK, "INVALID_ARGUMENT")])
def test_unauthenticated_large_requests_use_little_memory(
    teacher: TeacherProcess, channel: grpc.Channel, path: str, code: str
) -> None:
    body = pb.KVRequest(request_id="a" * BYTES).SerializeToString()  # also parses as a HealthCheckRequest
    before = peak_mb(teacher)
    codes = flood(lambda _: list(channel.unary_stream(path)(body, timeout=60)), CALLS)
    grown = peak_mb(teacher) - before
    assert set(codes) <= {grpc.StatusCode[code], grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert codes[grpc.StatusCode[code]]
    assert grown < CALLS * BYTES / MIB / 4
    check = channel.unary_unary(CHECK, response_deserializer=health_pb2.HealthCheckResponse.FromString)
    assert check(b"", timeout=30).status == health_pb2.HealthCheckResponse.SERVING


def test_log_lines_of_refused_calls_are_limited_and_counted(teacher: TeacherProcess, channel: grpc.Channel) -> None:
    calls = LINES_AT_ONCE + 200
    describe = channel.unary_unary(DESCRIBE)
    codes = flood(lambda _: [refused_describe(describe) for _ in range(calls // 10)], 10)
    assert codes == {grpc.StatusCode.OK: 10}
    wait_until(lambda: bool(teacher.events("calls_not_logged")))
    lines = len(teacher.events("call"))
    assert LINES_AT_ONCE <= lines < calls
    assert lines + sum(event["count"] for event in teacher.events("calls_not_logged")) == calls
    assert f'requests_total{{code="UNAUTHENTICATED",method="Describe"}} {float(calls)}' in teacher.get("/metrics").text


def refused_describe(describe: Any) -> None:
    with pytest.raises(grpc.RpcError, match="requires a token"):
        describe(b"", timeout=30)


def test_only_metadata_over_the_limit_is_refused(channel: grpc.Channel) -> None:
    check = channel.unary_unary(CHECK)
    check(b"", timeout=30, metadata=(("x-filler", "x" * (MAX_METADATA_BYTES - 1024)),))
    with pytest.raises(grpc.RpcError) as caught:
        check(b"", timeout=30, metadata=(("x-filler", "x" * (MAX_METADATA_BYTES + 1024)),))
    failed: Any = caught.value
    assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_open_reflection_calls_are_limited(channel: grpc.Channel) -> None:
    reflect = channel.stream_stream(REFLECT)
    ended = threading.Event()

    def hold() -> Iterator[bytes]:
        yield b"\x3a\x00"  # list_services
        ended.wait(60)

    held = [reflect(hold(), timeout=60) for _ in range(MAX_OPEN_REFLECTIONS)]
    try:
        for call in held:
            assert next(iter(call))
        with pytest.raises(grpc.RpcError, match="the limit"):
            list(reflect(iter([b"\x3a\x00"]), timeout=30))
    finally:
        ended.set()
    for call in held:
        list(call)
    assert list(reflect(iter([b"\x3a\x00"]), timeout=30))
