"""What callers without a token can make a server hold, read and log: over real TLS, against a real process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2

from teacher_server.config import MIB
from teacher_server.limits import MAX_METADATA_BYTES, MAX_OPEN_REFLECTIONS
from teacher_server.logs import LINES_AT_ONCE
from tests.integration.test_secure_transport import SECRET, certificate
from tests.support.servers import TeacherProcess, running_teacher, wait_until

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
    """The most memory that the server ever had resident."""
    status = Path(f"/proc/{teacher.pid}/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def flood(call: Callable[[int], object], calls: int) -> Counter[grpc.StatusCode]:
    """Makes many calls at once, and counts how they ended."""

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
def test_large_requests_without_a_token_are_refused_in_little_memory(
    teacher: TeacherProcess, channel: grpc.Channel, path: str, code: str
) -> None:
    body = bytes(BYTES)
    before = peak_mb(teacher)
    codes = flood(lambda _: list(channel.unary_stream(path)(body, timeout=60)), CALLS)
    grown = peak_mb(teacher) - before
    print(path, codes, f"grown {grown:.0f} MiB")
    assert set(codes) <= {grpc.StatusCode[code], grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert codes[grpc.StatusCode[code]]
    assert grown < CALLS * BYTES / MIB / 4
    check = channel.unary_unary(CHECK, response_deserializer=health_pb2.HealthCheckResponse.FromString)
    assert check(b"", timeout=30).status == health_pb2.HealthCheckResponse.SERVING
