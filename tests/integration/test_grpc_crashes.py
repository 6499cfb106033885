"""Tests of crashes of the gRPC server. A request whose path is not UTF-8 ends gRPC's accept loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import EncodedSampleKV, Sample
from kvcore.wire.stream_reader import StreamReader
from student_trainer.kv_sources.remote import RemoteSource
from student_trainer.launching.transport_variables import TLS_CA, TOKEN_FILE
from teacher_server import grpc_server
from teacher_server.config import ServeConfig
from teacher_server.engines.base import TeacherEngine
from teacher_server.engines.fake import FakeEngine, FakeModel
from tests.support.certificates import certificate
from tests.support.server_in_thread import ServerInThread
from tests.support.servers import TeacherClient, TeacherProcess, running_teacher, token_samples, wait_until
from tests.support.unreadable_request import send_unreadable_request

pytestmark = pytest.mark.slow

PLAN = KVPlan(layers=(0,), selection=Selection(span="all"))


@pytest.fixture
def start() -> Iterator[Callable[..., ServerInThread]]:
    servers: list[ServerInThread] = []

    def start_one(*arguments: Any) -> ServerInThread:
        servers.append(ServerInThread(*arguments))
        return servers[-1]

    yield start_one
    for server in servers:
        server.stop()


def load(config: ServeConfig) -> TeacherEngine:
    return FakeEngine(config, FakeModel(layers=2))


def ask(teacher: TeacherProcess) -> None:
    with closing(RemoteSource("a", teacher.endpoint, lambda _info: PLAN)) as source:
        source.connect()
        (answer,) = source.fetch([Sample("s", text="1 + 2 = 3")])
        assert isinstance(answer, EncodedSampleKV)


def crash(teacher: TeacherProcess, times: int, *, tls: bool = False) -> None:
    """Crash the gRPC server and wait for its restart."""
    with closing(send_unreadable_request(teacher.grpc_port, tls=tls)):
        wait_until(lambda: len(teacher.events("grpc_restarted")) == times)


def test_after_a_crash_the_port_serves_again_and_a_running_stream_finishes(tmp_path: Path) -> None:
    plan = KVPlan(layers=(0, 1, 2, 3), selection=Selection(selector="full", span="all"), codec=CodecSpec(name="raw"))
    options = {"engine": "fake", "stream_window_bytes": 1 << 20}
    model = "fake:layers=4,heads=4,dim=64"
    with running_teacher(model, tmp_path / "log", **options) as teacher, TeacherClient(teacher.endpoint) as client:
        samples = token_samples(8, 512)
        stream = client.call(plan, samples, "running")
        # The answer is far larger than the stream's window, so the stream stays open until it is read.
        frames = [next(stream)]
        crash(teacher, 1)
        assert teacher.get("/readyz").status_code == 200
        ask(teacher)
        reader = StreamReader("running", plan, samples, client.info)
        assert sum(len(reader.feed(frame)) for frame in [*frames, *stream]) == len(samples)
        reader.finish()
        metrics = teacher.get("/metrics").text
        assert "kvdistill_grpc_crashes_total 1.0" in metrics
        assert "kvdistill_ready 1.0" in metrics
        assert len(teacher.events("ready")) == 1
        assert teacher.stop() == 0


def test_after_a_crash_the_server_still_requires_tls_and_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = certificate(tmp_path / "tls")
    token = tmp_path / "token"
    token.write_text("a-long-secret-for-tests", encoding="utf-8")
    monkeypatch.setenv(TLS_CA, str(cert))
    monkeypatch.setenv(TOKEN_FILE, str(token))
    options = {"engine": "fake", "tls_cert": cert, "tls_key": key, "token_file": token}
    with running_teacher("fake:layers=2", tmp_path / "log", **options) as teacher:
        assert teacher.get("/readyz").status_code == 200
        crash(teacher, 1, tls=True)
        assert teacher.get("/readyz").status_code == 200
        ask(teacher)


def test_the_fifth_crash_within_a_minute_ends_the_process_with_status_1(tmp_path: Path) -> None:
    with running_teacher("fake:layers=2", tmp_path / "log", engine="fake") as teacher:
        for times in range(1, grpc_server.MOST_CRASHES):
            crash(teacher, times)
        with closing(send_unreadable_request(teacher.grpc_port)):
            assert teacher.wait() == 1
        (last,) = teacher.events("gave_up")
        assert "crashed 5 times within 60 s" in last["problem"]


def test_readyz_detects_an_unresponsive_grpc_server(
    start: Callable[..., ServerInThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "CRASH_CHECK_SECONDS", 3600.0)
    server = start(load)
    server.wait_ready()
    # gRPC's server does not report the crash while the connection of the bad request is open.
    with closing(send_unreadable_request(server.server.state.grpc_port)):
        wait_until(lambda: server.get("/readyz").status_code == 503)
        assert server.get("/readyz").text == "the gRPC server does not answer: UNAVAILABLE\n"


def test_a_crash_while_the_model_loads_leaves_the_server_loading(start: Callable[..., ServerInThread]) -> None:
    may_load = threading.Event()

    def load_later(config: ServeConfig) -> TeacherEngine:
        may_load.wait(60)
        return load(config)

    server = start(load_later)
    crashes = server.server.state.metrics.registry
    with closing(send_unreadable_request(server.server.state.grpc_port)):
        wait_until(lambda: crashes.get_sample_value("kvdistill_grpc_crashes_total") == 1)
        wait_until(lambda: server.server.state.grpc_problem is None)
    assert server.get("/readyz").text == "the model is loading\n"
    may_load.set()
    server.wait_ready()


def test_crashes_while_the_model_loads_end_the_server(
    start: Callable[..., ServerInThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "MOST_CRASHES", 1)
    may_load = threading.Event()

    def load_later(config: ServeConfig) -> TeacherEngine:
        may_load.wait(60)
        return load(config)

    server = start(load_later)
    with (
        closing(send_unreadable_request(server.server.state.grpc_port)),
        pytest.raises(grpc_server.GrpcCrashError, match="crashed 1 times"),
    ):
        server.ended.result(30)
    may_load.set()
