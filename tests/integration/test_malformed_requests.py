"""Tests of requests that are no protobuf messages: each is refused with INVALID_ARGUMENT and counted."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from teacher_server.engines.fake import FakeEngine, FakeModel
from tests.support.server_in_thread import CONFIG, ServerInThread
from tests.support.servers import refused
from tests.unit.test_request_size import field

METHODS = {
    "/kvcache.v1.TeacherKV/StreamKV": "unary_stream",
    "/kvcache.v1.TeacherKV/Generate": "unary_stream",
    "/kvcache.v1.TeacherKV/LoadMap": "stream_unary",
    "/grpc.health.v1.Health/Check": "unary_stream",
    "/grpc.health.v1.Health/Watch": "unary_stream",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "stream_stream",
}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerInThread]:
    running = ServerInThread(lambda config: FakeEngine(config, FakeModel(layers=2)), CONFIG)
    running.wait_ready()
    yield running
    running.stop()


@pytest.mark.parametrize("path", METHODS)
@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x7f", b"\x0a\x01\xff"], ids=["tag", "length", "text"])
def test_a_malformed_request_is_an_invalid_argument_and_counted(
    server: ServerInThread, path: str, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    method = path.rpartition("/")[2]
    counted = f'kvdistill_requests_total{{code="INVALID_ARGUMENT",method="{method}"}}'

    def count() -> float:
        lines = server.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(counted)), 0.0)

    before = count()
    kind = METHODS[path]
    with grpc.insecure_channel(server.endpoint) as channel:
        call = getattr(channel, kind)(path)
        request = iter([data]) if kind.startswith("stream") else data
        refusal = refused(lambda: list(call(request, timeout=30)))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT, refusal
    assert count() == before + 1
    assert "Traceback" not in caplog.text


def test_text_that_is_not_utf8_is_refused_by_its_field(server: ServerInThread) -> None:
    with grpc.insecure_channel(server.endpoint) as channel:
        call = channel.unary_stream("/kvcache.v1.TeacherKV/StreamKV")
        refusal = refused(lambda: list(call(field(3, field(1, b"a") + field(2, b"ab\xff")), timeout=30)))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.details == "samples.0.text: is not valid UTF-8 at byte 2"
