"""Tests of the lifecycle of a teacher server process: signals, draining, and failed starts."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.wire.stream_reader import StreamReader
from tests.support.servers import (
    ServerStartError,
    TeacherClient,
    health,
    refused,
    running_teacher,
    start_teacher,
    token_samples,
    wait_until,
)

RAW, FULL = CodecSpec(name="raw"), Selection(selector="full", span="all")

# A teacher with 8 KiB of raw K/V per token.
WIDE = "fake:layers=4,heads=4,dim=64"


def test_sigterm_lets_a_running_stream_finish_and_refuses_others(tmp_path: Path) -> None:
    plan = KVPlan(layers=(0, 1, 2, 3), selection=FULL, codec=RAW)
    options = {"engine": "fake", "stream_window_bytes": 1 << 20}
    with (
        running_teacher(WIDE, tmp_path / "log", **options) as teacher,
        TeacherClient(teacher.endpoint) as client,
        TeacherClient(teacher.endpoint) as late,
    ):
        samples = token_samples(8, 512)
        stream = client.call(plan, samples, "draining")
        frames = [next(stream)]
        teacher.signal(signal.SIGTERM)
        teacher.wait_event("draining")
        # The answer is far larger than the stream's window, so the stream stays open until it is read.
        ready = teacher.get("/readyz")
        assert (ready.status_code, ready.text) == (503, "the server is draining\n")
        assert health(teacher.endpoint) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert refused(lambda: late.fetch(plan, samples)).code is grpc.StatusCode.UNAVAILABLE
        frames += stream
        reader = StreamReader("draining", plan, samples, client.info)
        assert sum(len(reader.feed(frame)) for frame in frames) == len(samples)
        reader.finish()
        assert teacher.wait() == 0


def test_draining_ends_after_drain_seconds(tmp_path: Path) -> None:
    plan = KVPlan(layers=(0, 1, 2, 3), selection=FULL, codec=RAW)
    options = {"engine": "fake", "drain_seconds": 0.3, "stream_window_bytes": 1 << 20}
    with running_teacher(WIDE, tmp_path / "log", **options) as teacher, TeacherClient(teacher.endpoint) as client:
        stream = client.call(plan, token_samples(16, 512))
        next(stream)
        teacher.signal(signal.SIGTERM)
        assert teacher.wait() == 0
        assert teacher.events("drained")[0]["cut_off_streams"] == 1
        refused(lambda: list(stream))


def test_a_second_signal_exits_at_once(tmp_path: Path) -> None:
    plan = KVPlan(layers=(0, 1, 2), selection=FULL, codec=RAW)
    with (
        running_teacher("fake:layers=3,delay_ms=100", tmp_path / "log", engine="fake") as teacher,
        TeacherClient(teacher.endpoint) as client,
    ):
        stream = client.call(plan, token_samples(1, 1000))
        wait_until(lambda: teacher.info()["load"]["open_streams"] == 1)
        teacher.signal(signal.SIGINT)
        teacher.wait_event("draining")
        teacher.signal(signal.SIGINT)
        assert teacher.wait() == 1
        stream.cancel()


def test_a_loading_error_ends_the_process_with_one_line(tmp_path: Path) -> None:
    teacher = start_teacher(tmp_path / "nowhere", tmp_path / "log")
    with pytest.raises(ServerStartError):
        teacher.wait_ready()
    assert teacher.wait() != 0
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert "nowhere" in last
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_port_in_use_ends_the_process_and_names_the_flag(tmp_path: Path) -> None:
    flags = ("grpc_port", "http_port")
    with socket.create_server(("127.0.0.1", 0)) as occupant:
        taken = occupant.getsockname()[1]
        others = [start_teacher("fake:", tmp_path / flag, engine="fake", **{flag: taken}) for flag in flags]
        for flag, other in zip(flags, others, strict=True):
            assert other.wait() != 0
            last = other.log_path.read_text().strip().splitlines()[-1]
            assert flag in last
            assert str(taken) in last
