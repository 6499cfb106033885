"""Tests of `RemoteSource` over real gRPC: requests, failures and retries."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import grpc
import pytest

from kvcore.errors import ProtocolError, TeacherRefusedError, TeacherUnavailableError
from kvcore.types import EncodedSampleKV, MissingKV, Sample
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.remote import RemoteSource
from tests.support.kv_fakes import INFO, PLAN, kv_of, same_result, samples
from tests.support.scripted_teacher import ScriptedTeacher, busy, die_after, refuse

SAMPLES = samples(6)
IDS = [sample.id for sample in SAMPLES]


@pytest.fixture
def teacher() -> Iterator[ScriptedTeacher]:
    server = ScriptedTeacher()
    yield server
    server.stop()


@pytest.fixture
def source(teacher) -> Iterator[RemoteSource]:
    remote = connect(teacher)
    yield remote
    remote.close()


def connect(teacher: ScriptedTeacher, timeout_s: float = 20.0, patience_s: float = 5.0) -> RemoteSource:
    remote = RemoteSource("math", teacher.endpoint, lambda _: PLAN, timeout_s, patience_s)
    remote.connect()
    return remote


def all_right(results: list[KVResult]) -> bool:
    return all(same_result(result, kv_of(sample)) for result, sample in zip(results, SAMPLES, strict=True))


def flip_last_byte_of(*numbers: int) -> Callable[[bytes], bytes]:
    """Damage the frames with these numbers, counted from the first frame of the server."""
    count = iter(range(1000))

    def damage(frame: bytes) -> bytes:
        return frame[:-1] + bytes([frame[-1] ^ 1]) if next(count) in numbers else frame

    return damage


def test_the_plan_is_made_from_the_servers_description(teacher):
    seen = []
    remote = RemoteSource("math", teacher.endpoint, lambda info: seen.append(info) or PLAN)
    assert remote.connect() == INFO
    remote.close()
    assert seen == [INFO]


def test_a_fetch_is_split_by_the_servers_limit_of_samples_per_request(teacher, source):
    many = samples(20)
    assert [result.sample_id for result in source.fetch(many)] == [sample.id for sample in many]
    assert [len(ids) for ids in teacher.requests] == [8, 8, 4]


def test_a_fetch_is_split_into_requests_below_the_grpc_size_limit(teacher, source, monkeypatch):
    monkeypatch.setattr("student_trainer.kv_sources.request_sizes.REQUEST_BYTES", 70)
    assert all_right(source.fetch(SAMPLES))
    assert [len(ids) for ids in teacher.requests] == [2, 1, 1, 2]


def test_samples_received_before_the_stream_broke_are_kept(teacher, source):
    teacher.script = die_after(2)
    received: dict[str, KVResult] = {}
    with pytest.raises(TeacherUnavailableError, match="UNAVAILABLE: Socket closed"):
        source.fetch_into(SAMPLES, received)
    assert list(received) == IDS[:2]
    teacher.script = lambda _sent, _context: None
    source.fetch_into(SAMPLES, received)
    assert teacher.requests == [IDS, IDS[2:]]
    assert all_right([received[sample_id] for sample_id in IDS])


def test_samples_of_a_damaged_frame_are_requested_once_more(teacher, source):
    teacher.damage = flip_last_byte_of(3)
    assert all_right(source.fetch(SAMPLES))
    assert teacher.requests == [IDS, IDS[3:]]
    assert source.retries == 1


def test_frames_that_stay_damaged_are_reported(teacher, source):
    teacher.damage = flip_last_byte_of(*range(100))
    problem = f"teacher 'math' at {teacher.endpoint}: .* xxh3 .*'s0', 's1', 's2', 's3', 's4' and 1 more"
    with pytest.raises(ProtocolError, match=problem):
        source.fetch(SAMPLES)
    assert len(teacher.requests) == 2


def test_a_stream_that_ends_early_without_an_error_is_an_error(teacher, source):
    teacher.frames_at_most = 2
    with pytest.raises(ProtocolError, match="ended early, after 2 of 4 samples"):
        source.fetch(SAMPLES)
    assert teacher.requests == [IDS, IDS[2:]]


def test_a_full_server_is_retried_after_its_pushback(teacher, source):
    teacher.script = busy(2, pushback_ms="150")
    started = time.monotonic()
    assert all_right(source.fetch(SAMPLES))
    assert time.monotonic() - started >= 0.3
    assert source.retries == 2


def test_a_server_that_stays_full_raises_after_patience_s(teacher):
    remote = connect(teacher, patience_s=0.2)
    teacher.script = busy(1000, pushback_ms="50")
    with pytest.raises(TeacherUnavailableError, match=r"still full after 0\.2 s \(1048576 tokens wait already\)"):
        remote.fetch(SAMPLES)
    remote.close()


def test_a_full_server_without_a_pushback_is_asked_a_few_times_a_second_at_most(teacher):
    remote = connect(teacher, patience_s=1.0)
    teacher.script = busy(100_000, pushback_ms="0")
    with pytest.raises(TeacherUnavailableError, match="still full"):
        remote.fetch(SAMPLES)
    assert 2 <= len(teacher.requests) <= 20
    remote.close()


@pytest.mark.parametrize("pushback_ms", ["-1", "soon"])
def test_a_full_server_with_a_negative_pushback_is_not_retried(teacher, source, pushback_ms):
    teacher.script = busy(1, pushback_ms)
    with pytest.raises(TeacherUnavailableError, match="full: 1048576 tokens"):
        source.fetch(SAMPLES)
    assert len(teacher.requests) == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION])
def test_a_refusal_keeps_the_servers_message(teacher, source, code):
    teacher.script = refuse(code, "plan.layers: 9 is above the last layer 2")
    with pytest.raises(TeacherRefusedError) as caught:
        source.fetch(SAMPLES)
    assert str(caught.value) == f"teacher 'math': {teacher.endpoint} refused: plan.layers: 9 is above the last layer 2"
    assert len(teacher.requests) == 1


def test_control_characters_of_a_server_never_reach_a_message(teacher, source):
    teacher.script = refuse(grpc.StatusCode.INVALID_ARGUMENT, "plan: \x1b[2J\nall is well")
    with pytest.raises(TeacherRefusedError) as caught:
        source.fetch(SAMPLES)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.ABORTED])
def test_a_failing_server_counts_as_unavailable(teacher, source, code):
    teacher.script = refuse(code, "internal error 4711")
    with pytest.raises(TeacherUnavailableError, match=f"{code.name}: internal error 4711"):
        source.fetch(SAMPLES)


def test_a_server_that_hangs_fails_at_the_deadline(teacher):
    remote = connect(teacher, timeout_s=0.3)
    teacher.script = lambda sent, _context: teacher.released.wait(10) if sent == 3 else None
    received: dict[str, KVResult] = {}
    with pytest.raises(TeacherUnavailableError, match="DEADLINE_EXCEEDED"):
        remote.fetch_into(SAMPLES, received)
    assert len(received) == 3
    remote.close()


def test_a_sample_that_the_server_refuses_is_missing_with_its_reason(teacher, source):
    teacher.failing = {"s1"}
    results = source.fetch(SAMPLES)
    assert results[1] == MissingKV("s1", "FAILED_PRECONDITION: a key of layer 1")
    assert teacher.requests == [IDS]


def test_samples_that_failed_with_their_batch_are_requested_once_more_each_alone(teacher, source):
    teacher.failing = {"s1", "s4"}
    teacher.failure_code = "INTERNAL"

    def heal(_sent: int, _context: object) -> None:
        if len(teacher.requests) == 2:
            teacher.failing = {"s4"}

    teacher.script = heal
    results = source.fetch(SAMPLES)
    assert teacher.requests == [IDS, ["s1"], ["s4"]]
    assert isinstance(results[1], EncodedSampleKV)
    assert results[4] == MissingKV("s4", "INTERNAL: a key of layer 1")


def test_network_time_is_the_total_time_minus_the_servers_stages(teacher, source):
    teacher.script = lambda sent, _context: time.sleep(0.2) if sent == 0 else None
    (result,) = source.fetch(SAMPLES[:1])
    assert isinstance(result, EncodedSampleKV)
    assert (result.timings.queue, result.timings.prefill, result.timings.encode) == (0.001, 0.002, 0.003)
    assert result.timings.network >= 0.19


def test_frames_up_to_the_servers_limit_are_received(teacher):
    teacher.info = dataclasses.replace(INFO, max_frame_bytes=16 << 20, max_sample_tokens=2_000_000)
    remote = connect(teacher)
    long = Sample("long", token_ids=(7,) * 1_000_000)
    (result,) = remote.fetch([long])
    assert same_result(result, kv_of(long))
    remote.close()


def test_frames_above_the_servers_limit_are_refused(teacher, source):
    teacher.info = dataclasses.replace(INFO, max_frame_bytes=16 << 20)
    with pytest.raises(TeacherRefusedError, match="too large"):
        source.fetch([Sample("long", token_ids=(7,) * 1_000_000)])


def test_close_ends_a_fetch_in_progress(teacher, source):
    teacher.script = lambda sent, _context: teacher.released.wait(10) if sent == 2 else None
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(source.fetch, SAMPLES)
        threading.Event().wait(0.2)
        source.close()
        assert isinstance(running.exception(timeout=5), CancelledError)
    with pytest.raises(CancelledError):
        source.fetch(SAMPLES)


def test_connect_can_wait_for_a_server_that_is_not_up_yet():
    port = ScriptedTeacher()
    port.stop()
    remote = RemoteSource("math", port.endpoint, lambda _: PLAN)
    with pytest.raises(TeacherUnavailableError, match="UNAVAILABLE"):
        remote.connect()
    late: list[ScriptedTeacher] = []
    threading.Timer(0.3, lambda: late.append(ScriptedTeacher(port=port.port))).start()
    assert remote.connect(wait_s=20) == INFO
    remote.close()
    late[0].stop()


def test_an_endpoint_that_is_not_a_teacher_server_is_refused(teacher, monkeypatch):
    stranger = grpc.server(ThreadPoolExecutor(1))
    port = stranger.add_insecure_port("127.0.0.1:0")
    stranger.start()
    remote = RemoteSource("math", f"127.0.0.1:{port}", lambda _: PLAN)
    with pytest.raises(TeacherRefusedError, match="Method not found"):
        remote.connect()
    remote.close()
    stranger.stop(None).wait()


def test_an_invalid_description_is_refused(teacher):
    teacher.info = dataclasses.replace(INFO, layers=0)
    remote = RemoteSource("math", teacher.endpoint, lambda _: PLAN)
    with pytest.raises(TeacherRefusedError, match="sent an invalid description of itself: layers"):
        remote.connect()
    remote.close()


def test_a_response_of_another_teacher_than_at_connect_is_refused(teacher, source):
    teacher.info = dataclasses.replace(INFO, weights_digest="ff" * 16)
    received: dict[str, KVResult] = {}
    with pytest.raises(TeacherUnavailableError, match="another teacher answers"):
        source.fetch_into(SAMPLES, received)
    assert not received
