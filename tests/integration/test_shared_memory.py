"""K/V through shared memory, from real servers: the same bytes as through the network, also after faults."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import grpc
import msgpack
import pytest
import xxhash

from kvcore.errors import FieldError, ProtocolError, TeacherUnavailableError
from kvcore.plan import CodecSpec, KVPlan, SamplingParams, Selection
from kvcore.types import EncodedSampleKV, Sample
from kvcore.wire.shared_memory import MEMORY_METADATA, MIN_SHARED_BYTES, OpenedSlots
from protos import kv_cache_pb2 as pb
from student_trainer.config import KVConfig, TeacherConfig
from student_trainer.kv_sources import build_source, remote, shared_memory
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.completions import CompletionSource
from student_trainer.kv_sources.remote import RemoteSource
from student_trainer.launching.transport_variables import SHARED_MEMORY, TLS_CA, TOKEN_FILE
from tests.support.certificates import certificate
from tests.support.kv_fakes import same_result
from tests.support.servers import (
    REPOSITORY,
    TeacherProcess,
    kv_request,
    refused,
    running_teacher,
    start_teacher,
    token_samples,
    wait_until,
)
from tests.support.tiny_models import save_tiny_model, tiny_spec

PLAN = KVPlan(layers=(0, 2), selection=Selection(selector="full", span="all"), codec=CodecSpec(name="raw"))
# One layer of all of LARGE is one frame, the first one also has their tokens; a frame of SMALL is below the limit.
TOKENS = 8 * 400
LARGE, SMALL = token_samples(8, 400), token_samples(2, 400, "small")
FRAME_BYTES = TOKENS * (2 * 2 * 16 * 4 + 4)
LARGE_BYTES = 2 * FRAME_BYTES + 8 * TOKENS
FAKE = "fake:layers=3,heads=2,dim=16"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "llama", tiny_spec("llama"))


@pytest.fixture(scope="module")
def teacher(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with running_teacher(model, tmp_path_factory.mktemp("log") / "log") as server:
        yield server


def connected(teacher: TeacherProcess, plan: KVPlan = PLAN) -> RemoteSource:
    source = RemoteSource("ada", teacher.endpoint, lambda _info: plan, patience_s=5.0)
    source.connect()
    return source


def assert_same(some: Sequence[KVResult], others: Sequence[KVResult]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert isinstance(one, EncodedSampleKV)
        assert same_result(one, other)


def calls_so_far(teacher: TeacherProcess) -> int:
    """How many StreamKV and Generate calls have ended. All of them must have been logged."""
    wait_until(lambda: not teacher.info()["connections"])
    return len([call for call in teacher.events("call") if call["method"] in ("StreamKV", "Generate")])


def shared_bytes(teacher: TeacherProcess, since: int = 0) -> list[int]:
    """The bytes in shared memory of each call after the first ones."""
    calls_so_far(teacher)
    return [call["shared_bytes"] for call in teacher.events("call") if call["method"] in ("StreamKV", "Generate")][
        since:
    ]


def mapped(pid: int | str) -> bool:
    """Whether a process has shared memory of kvdistill."""
    gc.collect()
    return "memfd:kvdistill" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


def files_in_memory() -> list[Path]:
    return [path for path in Path("/dev/shm").iterdir() if "kvdistill" in path.name]


def test_kv_through_shared_memory_are_those_through_the_network(
    teacher: TeacherProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(SMALL) * FRAME_BYTES // 8 + 2 * 8 * 400 < MIN_SHARED_BYTES < FRAME_BYTES
    monkeypatch.setenv(SHARED_MEMORY, "0")
    with closing(connected(teacher)) as source:
        large, small = source.fetch(LARGE), source.fetch(SMALL)
        assert_same(source.fetch(LARGE), large)
    monkeypatch.setenv(SHARED_MEMORY, "1")
    before = calls_so_far(teacher)
    with caplog.at_level(logging.INFO), closing(connected(teacher)) as source:
        for _ in range(3):
            assert_same(source.fetch(LARGE), large)
        assert_same(source.fetch(SMALL), small)
        assert_same(source.fetch(LARGE), large)
        assert teacher.info()["shared_memory_bytes"] == 32 << 20
        assert source.retries == 0
    # The first large frames come through the network: only then memory is worth it.
    found = [0, LARGE_BYTES, LARGE_BYTES, 0, LARGE_BYTES]
    assert shared_bytes(teacher)[:before] == [0] * before
    assert shared_bytes(teacher, before) == found
    calls = [call["sent_bytes"] for call in teacher.events("call") if call["method"] == "StreamKV"]
    # Apart from headers: the last record may come in the same frame or in one of its own.
    assert abs(calls[before] - calls[before + 1]) < 1000
    metrics = dict(line.rsplit(" ", 1) for line in teacher.get("/metrics").text.splitlines())
    assert float(metrics["kvdistill_shared_bytes_total"]) == sum(found)
    logged = [record.getMessage() for record in caplog.records if "shared memory" in record.getMessage()]
    assert logged == [f"teacher 'ada': large frames of {teacher.endpoint} come through 33558528 bytes of shared memory"]


def test_recorded_kv_are_those_through_the_network(
    teacher: TeacherProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = token_samples(8, 390, "more")
    monkeypatch.setenv(SHARED_MEMORY, "0")
    with closing(connected(teacher)) as source:
        wanted = source.fetch(LARGE) + source.fetch(more)
    monkeypatch.delenv(SHARED_MEMORY)
    before = calls_so_far(teacher)
    config = TeacherConfig(name="ada", endpoints=(teacher.endpoint,))
    recording = build_source(config, KVConfig(mode="record", store=tmp_path), lambda _info: PLAN, 0, 1)
    with closing(recording):
        assert_same(recording.fetch(LARGE) + recording.fetch(more), wanted)
    assert shared_bytes(teacher, before) == [0, LARGE_BYTES * 390 // 400]
    stored = build_source(config, KVConfig(mode="offline", store=tmp_path), lambda _info: PLAN, 0, 1)
    with closing(stored):
        assert_same(stored.fetch(LARGE) + stored.fetch(more), wanted)


def test_kv_of_generated_texts_come_through_shared_memory(
    teacher: TeacherProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [Sample(f"p{n}", text="The start is 3. Add 4. " * 20 + f"{n}") for n in range(12)]
    sampling = SamplingParams(max_new_tokens=2)
    answers: dict[str, list[KVResult]] = {}
    before = calls_so_far(teacher)
    for value in ("0", "1"):
        monkeypatch.setenv(SHARED_MEMORY, value)
        with closing(CompletionSource("ada", teacher.endpoint, lambda _info: PLAN, sampling)) as source:
            source.connect()
            for _ in range(2):
                answers[value] = [answer.kv for answer in source.complete(prompts)]
    assert_same(answers["1"], answers["0"])
    assert [found > 0 for found in shared_bytes(teacher, before)] == [False, False, False, True]


def test_a_body_that_was_replaced_before_it_was_read_is_requested_again(
    teacher: TeacherProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = OpenedSlots.read

    def too_late(slots: OpenedSlots, place: pb.SharedBody) -> bytes:
        monkeypatch.setattr(OpenedSlots, "read", read)
        slots._written[place.slot] += 1
        return read(slots, place)

    with closing(connected(teacher)) as source:
        wanted = source.fetch(LARGE)
        monkeypatch.setattr(OpenedSlots, "read", too_late)
        assert_same(source.fetch(LARGE), wanted)
        assert source.retries == 1
        assert "it was read too late; retrying once" in caplog.text
        assert_same(source.fetch(LARGE), wanted)
        assert source.retries == 1


def test_a_damaged_byte_in_shared_memory_is_noticed(teacher: TeacherProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    read = OpenedSlots.read

    def damaged(slots: OpenedSlots, place: pb.SharedBody) -> bytes:
        monkeypatch.setattr(OpenedSlots, "read", read)
        view = slots._layout.slot(slots._memory, place.slot, place.size)
        view[place.size // 2] ^= 1
        return read(slots, place)

    with closing(connected(teacher)) as source:
        wanted = source.fetch(LARGE)
        monkeypatch.setattr(OpenedSlots, "read", damaged)
        assert_same(source.fetch(LARGE), wanted)
        assert source.retries == 1


def test_faults_on_purpose_spoil_answers_in_shared_memory_but_no_kv(tmp_path: Path) -> None:
    flags = {"engine": "fake", "chaos": "flip=0.3,truncate=0.3,seed=1", "shared_client_bytes": 2 << 20}
    with running_teacher(FAKE, tmp_path / "log", **flags) as server, closing(connected(server)) as source:
        answers: list[list[KVResult]] = []
        for _ in range(12):
            with suppress(ProtocolError):
                answers.append(source.fetch(LARGE))
        for answer in answers:
            assert_same(answer, answers[0])
        found = shared_bytes(server)
    assert source.retries > 0
    assert len({fault["fault"] for fault in server.events("chaos_fault")}) == 2
    # There are two slots. Those of bodies that were never read are used again.
    assert found[-1] > 0


def opened(channel: grpc.Channel) -> pb.OpenMemoryResponse:
    call = channel.unary_unary(
        "/kvcache.v1.TeacherKV/OpenMemory",
        request_serializer=pb.OpenMemoryRequest.SerializeToString,
        response_deserializer=pb.OpenMemoryResponse.FromString,
    )
    return call(pb.OpenMemoryRequest(), timeout=10)


def frames(channel: grpc.Channel, *metadata: tuple[str, str]) -> list[pb.KVFrame]:
    call: Any = channel.unary_stream(
        "/kvcache.v1.TeacherKV/StreamKV",
        request_serializer=pb.KVRequest.SerializeToString,
        response_deserializer=pb.KVFrame.FromString,
    )
    return list(call(kv_request(PLAN, LARGE), timeout=60, metadata=metadata))


def test_a_client_that_reads_nothing_does_not_hold_up_the_server(tmp_path: Path) -> None:
    flags = {"engine": "fake", "max_frame_bytes": FRAME_BYTES, "shared_client_bytes": 3 * FRAME_BYTES}
    with running_teacher(FAKE, tmp_path / "log", **flags) as server, grpc.insecure_channel(server.endpoint) as channel:
        memory = OpenedSlots(opened(channel))
        answers = [frames(channel, (MEMORY_METADATA, memory.key)) for _ in range(3)]
        bodies = [frame for answer in answers for frame in answer if size_of(frame) >= MIN_SHARED_BYTES]
        assert len(bodies) > 3
        assert [frame.HasField("shared_body") for frame in bodies] == [True] * 3 + [False] * (len(bodies) - 3)
        wanted = [xxhash.xxh3_64_intdigest(memory.read(frame.shared_body)) for frame in bodies[:3]]
        headers: list[Any] = [msgpack.unpackb(frame.header) for frame in bodies[:3]]
        assert wanted == [header["xxh3"] for header in headers]


def size_of(frame: pb.KVFrame) -> int:
    return len(frame.body) or frame.shared_body.size


def test_a_client_that_does_not_name_memory_sees_no_difference(teacher: TeacherProcess) -> None:
    with grpc.insecure_channel(teacher.endpoint, options=[("grpc.max_receive_message_length", 8 << 20)]) as channel:
        memory = OpenedSlots(opened(channel))
        for metadata in ((), ((MEMORY_METADATA, "0" * len(memory.key)),)):
            answer = frames(channel, *metadata)
            assert max(len(frame.body) for frame in answer) >= FRAME_BYTES
            assert not any(frame.HasField("shared_body") for frame in answer)
            assert {number for frame in answer for number, _ in frame.ListFields()} <= set(pb.KVFrame.DESCRIPTOR.fields)


def test_a_server_without_shared_memory_answers_through_the_network(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "ASK_AGAIN_SECONDS", 0.0)
    with running_teacher(FAKE, tmp_path / "log", engine="fake", shared_memory_bytes=0) as server:
        with caplog.at_level(logging.INFO), closing(connected(server)) as source:
            wanted = source.fetch(LARGE)
            for _ in range(2):
                assert_same(source.fetch(LARGE), wanted)
        assert shared_bytes(server) == [0, 0, 0]
        assert len(server.events("call")) == 1 + 2 + 3
    logged = [record for record in caplog.records if "shared memory" in record.getMessage()]
    assert [record.levelname for record in logged] == ["INFO"]
    assert "the server shares no memory (shared_memory_bytes is 0)" in logged[0].getMessage()


@pytest.mark.slow
def test_a_client_opens_the_memory_of_a_server_that_was_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "ASK_AGAIN_SECONDS", 0.0)
    with running_teacher(FAKE, tmp_path / "log", engine="fake") as first, closing(connected(first)) as source:
        wanted = source.fetch(LARGE)
        assert_same(source.fetch(LARGE), wanted)
        assert shared_bytes(first)[-1] > 0
        first.kill()
        with running_teacher(FAKE, tmp_path / "log2", engine="fake", grpc_port=first.grpc_port) as second:
            wait_until(lambda: bool(source.connect()))
            for _ in range(3):
                assert_same(source.fetch(LARGE), wanted)
            assert [found > 0 for found in shared_bytes(second)] == [False, True, True]


def test_memory_is_only_for_callers_that_the_server_authenticates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = certificate(tmp_path / "tls")
    token = tmp_path / "token"
    token.write_text("a-long-secret-for-tests", encoding="utf-8")
    flags = {"engine": "fake", "tls_cert": cert, "tls_key": key, "token_file": token}
    monkeypatch.setenv(TLS_CA, str(cert))
    with running_teacher(FAKE, tmp_path / "log", **flags) as server:
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        with grpc.secure_channel(server.endpoint, credentials) as channel:
            assert refused(lambda: opened(channel)).code is grpc.StatusCode.UNAUTHENTICATED
        assert server.info()["shared_memory_bytes"] == 0
        monkeypatch.setenv(TOKEN_FILE, str(token))
        with closing(connected(server)) as source:
            wanted = source.fetch(LARGE)
            assert_same(source.fetch(LARGE), wanted)
        assert shared_bytes(server)[-1] > 0


CLIENT = """
import sys, time
from student_trainer.kv_sources.remote import RemoteSource
from tests.integration.test_shared_memory import LARGE, PLAN

source = RemoteSource("ada", sys.argv[1], lambda _info: PLAN)
source.connect()
source.fetch(LARGE)
source.fetch(LARGE)
print("fetched", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_nothing_is_left_of_a_client_that_was_killed(tmp_path: Path) -> None:
    with running_teacher(FAKE, tmp_path / "log", engine="fake") as server:
        command = [sys.executable, "-c", CLIENT, server.endpoint]
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "fetched\n"
            assert shared_bytes(server)[-1] > 0
            assert mapped(client.pid)
            assert files_in_memory() == []
            client.send_signal(signal.SIGKILL)
            client.wait()
        wait_until(lambda: server.info()["shared_memory_bytes"] == 0, 30)
        wait_until(lambda: not mapped(server.pid))
        assert files_in_memory() == []


def test_nothing_is_left_of_a_server_that_was_killed(tmp_path: Path) -> None:
    server = start_teacher(FAKE, tmp_path / "log", engine="fake").wait_ready()
    with closing(connected(server)) as source:
        source.fetch(LARGE)
        source.fetch(LARGE)
        assert mapped(server.pid)
        server.kill()
        with pytest.raises(TeacherUnavailableError):
            source.fetch(LARGE)
    assert files_in_memory() == []
    del source
    wait_until(lambda: not mapped("self"))


def test_a_fetch_that_asks_a_hanging_server_for_memory_can_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_teacher(FAKE, tmp_path / "log", engine="fake") as server, closing(connected(server)) as source:
        wanted = source.fetch(LARGE)
        monkeypatch.setattr(remote, "DESCRIBE_TIMEOUT_S", 600.0)
        last_call = source._running
        os.kill(server.pid, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            try:
                fetching = pool.submit(source.fetch, LARGE)
                wait_until(lambda: source._running is not last_call)
                source.cancel()
                with pytest.raises(CancelledError):
                    fetching.result(60)
            finally:
                os.kill(server.pid, signal.SIGCONT)
        source.resume()
        # It asks again at once.
        assert_same(source.fetch(LARGE), wanted)
        assert shared_bytes(server)[-1] > 0


def test_a_senseless_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHARED_MEMORY, "yes")
    with pytest.raises(FieldError, match=r"^KVDISTILL_SHARED_MEMORY: must be 0 or 1 \(got 'yes'\)$"):
        RemoteSource("ada", "127.0.0.1:1", lambda _info: PLAN)


def test_remote_servers_are_not_asked_for_memory() -> None:
    for endpoint, here in (("127.0.0.1:1", True), ("[::1]:1", True), ("localhost:1", True), ("192.0.2.1:1", False)):
        asked: list[str] = []

        def ask(name: str = endpoint, asked: list[str] = asked) -> pb.OpenMemoryResponse:
            asked.append(name)
            return pb.OpenMemoryResponse(problem="none")

        memory = shared_memory.MemoryOfEndpoint("ada", endpoint)
        assert memory.for_request(ask) is None
        memory.note_frame(MIN_SHARED_BYTES)
        assert memory.for_request(ask) is None
        assert asked == [endpoint] * here
