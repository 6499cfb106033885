"""Tests of failover with real `kvdistill serve` processes that are killed, frozen, restarted and overloaded."""

import logging
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvcore.errors import TeacherMismatchError, TeacherUnavailableError
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import Sample, Span, TeacherInfo
from student_trainer.config import KVConfig, TeacherConfig
from student_trainer.kv_sources import build_source
from student_trainer.kv_sources.base import KVResult, KVSource
from tests.support.kv_fakes import same_result
from tests.support.servers import REPOSITORY, TeacherProcess, start_teacher, wait_until

MODEL = "fake:layers=3,delay_ms={delay_ms}"
QUICK = MODEL.format(delay_ms=0)
# With a batch per sample, each sample takes about 0.15 s.
SLOW = MODEL.format(delay_ms=3)
ONE_AT_A_TIME = 64

Serve = Callable[..., TeacherProcess]


@pytest.fixture
def serve(tmp_path) -> Iterator[Serve]:
    started: list[TeacherProcess] = []

    def start(model: str = QUICK, **options: Any) -> TeacherProcess:
        log_path = tmp_path / f"server-{len(started)}.log"
        started.append(start_teacher(model, log_path, engine="fake", name="fake-teacher", **options))
        return started[-1]

    yield start
    for teacher in started:
        if teacher.process.poll() is None:
            teacher.kill()


def samples(count: int) -> list[Sample]:
    text = "Start at {}. Reasoning: one and two is three. Answer: 3"
    return [
        Sample(f"q{i}", text=text.format(i), spans=(Span("prompt", 0, 12), Span("reasoning", 12, 40)))
        for i in range(10, 10 + count)
    ]


def plan_for(info: TeacherInfo) -> KVPlan:
    selection = Selection(selector="right", budget=5, span="reasoning")
    return KVPlan(layers=tuple(range(info.layers)), selection=selection, codec=CodecSpec(name="int8"))


def source_of(*teachers: TeacherProcess, **kv: Any) -> KVSource:
    config = TeacherConfig(name="math", endpoints=tuple(teacher.endpoint for teacher in teachers))
    return build_source(config, KVConfig(**{"prefetch": 0, "patience_s": 20.0, **kv}), plan_for, rank=0, world_size=1)


def counted(source: KVSource) -> tuple[int, int]:
    """The numbers of switches and retries of the source."""
    health = source.health()
    assert health is not None
    return health.switches, health.retries


def undisturbed(teacher: TeacherProcess, count: int) -> list[KVResult]:
    source = source_of(teacher)
    try:
        return source.fetch(samples(count))
    finally:
        source.close()


def same(left: list[KVResult], right: list[KVResult]) -> bool:
    return all(same_result(*pair) for pair in zip(left, right, strict=True))


def wait_until_served(teacher: TeacherProcess, count: int) -> None:
    """Wait until the server has finished `count` samples."""
    deadline = time.monotonic() + 30
    pattern = re.compile(r'^kvdistill_samples_total\{status="ok"\} (\S+)$', re.MULTILINE)
    while time.monotonic() < deadline:
        found = pattern.search(teacher.get("/metrics").text)
        if found and float(found.group(1)) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{count} samples were not served in time")


def streams(teacher: TeacherProcess) -> list[int]:
    """The number of samples of each StreamKV call."""
    return [event["samples"] for event in teacher.events("call") if event["method"] == "StreamKV"]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_another_replica_answers_the_remaining_samples_of_a_lost_replica(serve, caplog, end):
    lost, other = serve(SLOW, max_batch_tokens=ONE_AT_A_TIME), serve()
    lost.wait_ready()
    other.wait_ready()
    source = source_of(lost, other, request_timeout_s=10.0)
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(1) as pool:
        running = pool.submit(source.fetch, samples(12))
        wait_until_served(lost, 4)
        lost.signal(end)
        results = running.result(timeout=60)
    assert counted(source) == (1, 1)
    source.close()
    (still_missing,) = (int(found) for found in re.findall(r"(\d+) samples are still to be fetched", caplog.text))
    assert 0 < still_missing < 12
    # The first request compares the replicas.
    assert streams(other) == [1, still_missing]
    assert same(results, undisturbed(other, 12))


def test_a_lost_teacher_is_reported_by_name_after_patience_s(serve):
    only = serve(SLOW, max_batch_tokens=ONE_AT_A_TIME).wait_ready()
    source = source_of(only, patience_s=1.5, prefetch=2)
    pending = source.submit(samples(12))
    wait_until_served(only, 2)
    only.kill()
    with pytest.raises(TeacherUnavailableError) as caught:
        pending.result()
    source.close()
    message = str(caught.value)
    assert re.match(r"teacher 'math': no endpoint answered for [12]\.\d s \(127\.0\.0\.1:\d+: UNAVAILABLE: ", message)
    assert message.count(only.endpoint) == 1
    assert "start the run again" in message


def test_a_server_restarted_on_its_port_is_used_again(serve):
    first = serve().wait_ready()
    source = source_of(first)
    before = source.fetch(samples(4))
    first.kill()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(source.fetch, samples(4))
        serve(grpc_port=first.grpc_port).wait_ready()
        assert same(running.result(timeout=30), before)
    source.close()


def test_a_rolling_restart_under_load_fails_no_fetch(serve):
    replicas = [serve(QUICK, drain_seconds=2.0).wait_ready() for _ in range(3)]
    expected = undisturbed(replicas[0], 6)
    sources = [source_of(*replicas) for _ in range(2)]
    fetches, stop = [0, 0], threading.Event()

    def load(number: int) -> None:
        while not stop.is_set():
            assert same(sources[number].fetch(samples(6)), expected)
            fetches[number] += 1

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(load, number) for number in range(2)]
        try:
            for replica in list(replicas):
                port = replica.grpc_port
                replica.process.terminate()
                assert replica.process.wait(20) == 0
                serve(QUICK, grpc_port=port).wait_ready()
                before = list(fetches)
                wait_until(lambda before=before: all(now > then for now, then in zip(fetches, before, strict=True)))
        finally:
            stop.set()
        for each in running:
            each.result(60)
    assert min(fetches) > 3
    for source in sources:
        source.close()


def test_a_server_restarted_as_another_teacher_is_refused(serve):
    first = serve().wait_ready()
    source = source_of(first)
    source.fetch(samples(4))
    first.kill()
    serve("fake:layers=5", grpc_port=first.grpc_port).wait_ready()
    with pytest.raises(TeacherMismatchError, match="5 layers"):
        source.fetch(samples(4))
    source.close()


def test_replicas_of_different_teachers_are_refused(serve):
    one, other = serve(), serve("fake:layers=5")
    one.wait_ready()
    other.wait_ready()
    with pytest.raises(TeacherMismatchError, match=rf"{other.endpoint} serves .* but {one.endpoint} served"):
        source_of(one, other)


def test_all_students_of_an_overloaded_teacher_get_their_samples(serve):
    # Three students request 6 samples each; the queue holds the samples of two students.
    teacher = serve(SLOW, max_batch_tokens=ONE_AT_A_TIME, max_queued_tokens=700).wait_ready()
    sources = [source_of(teacher, patience_s=60.0) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda source: source.fetch(samples(6)), sources))
    assert sum(counted(source)[1] for source in sources) > 0
    assert sum(counted(source)[0] for source in sources) == 0
    for source in sources:
        source.close()
    assert same(results[0], results[1])
    assert same(results[0], results[2])


RECORDING = """
import os, sys
from pathlib import Path
from tests.integration.test_failover import KVConfig, TeacherConfig, build_source, plan_for, samples

config = TeacherConfig(name="math", endpoints=(sys.argv[1],))
source = build_source(config, KVConfig(mode="record", store=Path(sys.argv[2])), plan_for, rank=0, world_size=1)
source.fetch(samples(12)[:5])
source.flush()
source.fetch(samples(12)[5:7])
os.kill(os.getpid(), 9)
"""


def test_killed_recording_resumes_and_equals_the_online_run(serve, tmp_path):
    teacher = serve().wait_ready()
    online = undisturbed(teacher, 12)
    store = tmp_path / "store"
    killed = subprocess.run(
        [sys.executable, "-c", RECORDING, teacher.endpoint, str(store)], cwd=REPOSITORY, timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL

    resumed = source_of(teacher, mode="record", store=store, prefetch=2)
    batches = [samples(12)[:4], samples(12)[4:8], samples(12)[8:]]
    pending = [resumed.submit(batch) for batch in batches]
    recorded = [result for one in pending for result in one.result()]
    resumed.close()
    assert streams(teacher) == [12, 5, 2, 3, 4]
    assert same(recorded, online)

    teacher.stop()
    offline = source_of(teacher, mode="offline", store=store, prefetch=2)
    assert same(offline.submit(samples(12)).result(), online)
    offline.close()
