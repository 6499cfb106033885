"""Tests of the contract of every KV source."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcore.errors import FieldError, StoreError, TeacherMismatchError
from kvcore.plan import CodecSpec
from kvcore.types import MissingKV, Sample
from student_trainer.config import KVConfig, TeacherConfig
from student_trainer.kv_sources import build_source
from student_trainer.kv_sources.base import KVSource
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.kept import Kept
from student_trainer.kv_sources.offline import OfflineSource
from student_trainer.kv_sources.prefetch import Prefetch
from student_trainer.kv_sources.record import Record
from student_trainer.kv_sources.remote import RemoteSource
from student_trainer.kv_sources.shuffled import ShuffledControl
from tests.support.kv_fakes import INFO, PLAN, MemorySource, kv_of, same_result, samples
from tests.support.scripted_teacher import ScriptedTeacher
from tests.support.servers import wait_until

MISSING = "s5"
SAMPLES = samples(20)
TEACHER = "math"


@dataclasses.dataclass
class Bench:
    """The parts of the sources under test. Every sample except `MISSING` has K/V."""

    teachers: tuple[ScriptedTeacher, ScriptedTeacher]
    directory: Path

    def config(self) -> TeacherConfig:
        return TeacherConfig(name=TEACHER, endpoints=tuple(teacher.endpoint for teacher in self.teachers))

    def remote(self, which: int = 0) -> RemoteSource:
        return RemoteSource(TEACHER, self.teachers[which].endpoint, lambda _: PLAN)

    def connected_remote(self) -> RemoteSource:
        source = self.remote()
        source.connect()
        return source

    def failover(self) -> FailoverSource:
        source = FailoverSource(TEACHER, [self.remote(0), self.remote(1)], patience_s=5.0)
        source.connect()
        return source

    def recorded(self) -> Path:
        """A store of all samples."""
        store = self.directory / TEACHER
        record = Record(MemorySource(missing=[MISSING]), store, "rank0", merges_index=True)
        record.fetch(SAMPLES)
        record.close()
        return store

    def half_recorded(self) -> Record:
        """A recording that was interrupted and started again."""
        store = self.directory / TEACHER
        interrupted = Record(MemorySource(), store, "rank0", merges_index=False)
        interrupted.fetch(SAMPLES[:4])
        interrupted.fetch(SAMPLES[10:14])
        interrupted.close()
        return Record(MemorySource(missing=[MISSING]), store, "rank0", merges_index=True)

    def built(self, **kv: Any) -> KVSource:
        return build_source(self.config(), KVConfig(**kv), lambda _: PLAN, rank=1, world_size=2)

    def built_offline(self) -> KVSource:
        self.recorded()
        return self.built(mode="offline", store=self.directory)


Build = Callable[[Bench], KVSource]

SOURCES: dict[str, Build] = {
    "memory": lambda _: MemorySource(missing=[MISSING]),
    "remote": Bench.connected_remote,
    "failover": Bench.failover,
    "prefetch": lambda _: Prefetch(MemorySource(missing=[MISSING]), depth=2),
    "kept": lambda _: Kept(MemorySource(missing=[MISSING]), most_bytes=10_000),
    "offline": lambda bench: OfflineSource(bench.recorded(), lambda _: PLAN),
    "record": lambda bench: Record(MemorySource(missing=[MISSING]), bench.directory, "rank0", merges_index=True),
    "resumed record": Bench.half_recorded,
    "built online": lambda bench: bench.built(mode="online"),
    "built record": lambda bench: bench.built(mode="record", store=bench.directory),
    "built offline": Bench.built_offline,
}


@pytest.fixture(scope="module")
def teachers() -> Iterator[tuple[ScriptedTeacher, ScriptedTeacher]]:
    pair = ScriptedTeacher(), ScriptedTeacher()
    for teacher in pair:
        teacher.failing = {MISSING}
    yield pair
    for teacher in pair:
        teacher.stop()


@pytest.fixture
def bench(teachers, tmp_path) -> Bench:
    return Bench(teachers, tmp_path)


@pytest.fixture(params=SOURCES)
def source(request, bench) -> Iterator[KVSource]:
    built = SOURCES[request.param](bench)
    yield built
    built.close()


def test_source_has_its_teacher_and_plan(source):
    assert source.info == INFO
    assert source.plan == PLAN


def test_results_are_the_teachers_bytes_in_order(source):
    some = [sample for sample in SAMPLES[::-1] if sample.id != MISSING]
    results = source.fetch(some)
    assert [result.sample_id for result in results] == [sample.id for sample in some]
    assert all(same_result(result, kv_of(sample)) for result, sample in zip(results, some, strict=True))


def test_a_missing_sample_does_not_affect_the_others(source):
    results = source.fetch(SAMPLES)
    missing = [result for result in results if isinstance(result, MissingKV)]
    assert [result.sample_id for result in missing] == [MISSING]
    assert missing[0].reason
    assert results.index(missing[0]) == 5
    assert all(same_result(result, kv_of(SAMPLES[i])) for i, result in enumerate(results) if i != 5)


def test_submitted_batches_are_answered_like_fetched_ones(source):
    batches = [SAMPLES[6:9], SAMPLES[9:12], SAMPLES[12:20]]
    submitted = [(batch, source.submit(batch)) for batch in batches]
    for batch, pending in submitted:
        assert all(same_result(result, kv_of(sample)) for result, sample in zip(pending.result(), batch, strict=True))


def test_batches_fetched_between_submit_and_result_do_not_change_the_result(source):
    pending = source.submit(SAMPLES[:3])
    source.fetch(SAMPLES[2:5])
    assert [result.sample_id for result in pending.result()] == ["s0", "s1", "s2"]


def test_the_same_samples_can_be_fetched_again(source):
    first, second = source.fetch(SAMPLES[:3]), source.fetch(SAMPLES[:3])
    assert all(same_result(*pair) for pair in zip(first, second, strict=True))


def test_a_sample_that_is_twice_in_a_batch_is_answered_twice(source):
    results = source.fetch([SAMPLES[1], SAMPLES[2], SAMPLES[1]])
    assert [result.sample_id for result in results] == ["s1", "s2", "s1"]
    assert same_result(results[0], results[2])


def test_an_empty_batch_has_no_results(source):
    assert source.fetch([]) == []


def test_source_can_be_closed_twice_with_pending_batches(source):
    source.submit(SAMPLES[:3])
    source.submit(SAMPLES[3:6])
    source.close()
    source.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "kv-prefetch"]


def test_validation_prefetches_beside_the_batches_that_training_has_requested(bench, teachers):
    for teacher in teachers:
        teacher.requests.clear()
    source = bench.built(prefetch=2)
    in_training = [source.submit(SAMPLES[at : at + 1]) for at in (0, 1)]
    in_validation = [source.submit(SAMPLES[at : at + 1]) for at in (2, 3, 4)]
    wait_until(lambda: sum(len(teacher.requests) for teacher in teachers) == 4)
    for pending in in_validation + in_training:
        pending.result()
    source.close()


def test_shuffled_control_gives_each_sample_the_kv_of_another(bench, caplog):
    source = ShuffledControl(bench.failover())
    results = source.fetch(SAMPLES[:4])
    source.close()
    assert [result.sample_id for result in results] == ["s3", "s0", "s1", "s2"]
    assert same_result(results[1], kv_of(SAMPLES[0]))
    assert sum("ANOTHER" in record.getMessage() for record in caplog.records) == 1


def test_shuffled_control_moves_missing_kv_along():
    results = ShuffledControl(MemorySource(missing=["s0"])).fetch(SAMPLES[:3])
    assert [isinstance(result, MissingKV) for result in results] == [False, True, False]


def test_shuffled_control_refuses_a_batch_of_one_sample():
    with pytest.raises(FieldError, match="at least 2 samples"):
        ShuffledControl(MemorySource()).fetch(SAMPLES[:1])


def test_shuffled_control_does_not_change_what_is_recorded(bench):
    source = bench.built(mode="record", store=bench.directory, control="shuffled")
    source.fetch(SAMPLES[:3])
    source.close()
    unshuffled = OfflineSource(bench.directory / TEACHER, lambda _: PLAN)
    assert all(same_result(result, kv_of(SAMPLES[i])) for i, result in enumerate(unshuffled.fetch(SAMPLES[:3])))


def test_a_shuffled_source_can_give_each_sample_its_own_kv(bench):
    source = bench.built(control="shuffled")
    own = [kv_of(sample) for sample in SAMPLES[:3]]
    assert all(same_result(*pair) for pair in zip(source.without_control().fetch(SAMPLES[:3]), own, strict=True))
    assert not any(same_result(*pair) for pair in zip(source.fetch(SAMPLES[:3]), own, strict=True))
    source.close()


def test_a_resumed_recording_requests_only_missing_samples(bench):
    record = bench.half_recorded()
    inner = record.source
    assert isinstance(inner, MemorySource)
    pending = [record.submit(SAMPLES[:8]), record.submit(SAMPLES[10:14])]
    assert [len(one.result()) for one in pending] == [8, 4]
    assert inner.submitted == inner.fetched == [["s4", "s5", "s6", "s7"]]
    record.close()


def test_a_sample_in_two_pending_batches_is_stored_once(bench):
    inner = MemorySource()
    record = Record(inner, bench.directory, "rank0", merges_index=False)
    first, second = record.submit(SAMPLES[:2]), record.submit(SAMPLES[1:3])
    first.result()
    second.result()
    record.close()
    assert inner.fetched == inner.submitted == [["s0", "s1"], ["s1", "s2"]]
    journal = (bench.directory / "rank0.jsonl").read_text().splitlines()
    assert len(journal) == 3


def test_samples_with_equal_content_share_the_stored_kv_but_keep_their_ids(bench):
    inner = MemorySource()
    record = Record(inner, bench.directory, "rank0", merges_index=True)
    record.fetch(SAMPLES[:1])
    twin = Sample("twin", token_ids=SAMPLES[0].token_ids)
    assert [result.sample_id for result in record.fetch([twin])] == ["twin"]
    record.close()
    offline = OfflineSource(bench.directory, lambda _: PLAN)
    assert [result.sample_id for result in offline.fetch([twin, SAMPLES[0]])] == ["twin", "s0"]
    assert inner.fetched == [["s0"]]


def test_flushed_samples_are_readable_before_close(bench):
    source = bench.built(mode="record", store=bench.directory)
    source.fetch(SAMPLES[:3])
    source.flush()
    offline = OfflineSource(bench.directory / TEACHER, lambda _: PLAN)
    assert all(same_result(result, kv_of(SAMPLES[i])) for i, result in enumerate(offline.fetch(SAMPLES[:3])))
    source.close()


def test_offline_reports_the_difference_from_the_recorded_plan(bench):
    other = PLAN.model_copy(update={"codec": CodecSpec(name="bf16")})
    store = bench.recorded()
    with pytest.raises(StoreError, match=r"codec\.name: 'int8', not 'bf16'"):
        OfflineSource(store, lambda _: other)


def test_recording_another_teacher_into_a_store_is_refused(bench, teachers):
    bench.recorded()
    stranger = ScriptedTeacher(dataclasses.replace(INFO, weights_digest="ff" * 16))
    config = TeacherConfig(name=TEACHER, endpoints=(stranger.endpoint,))
    with pytest.raises(StoreError, match="weights_digest"):
        build_source(config, KVConfig(mode="record", store=bench.directory), lambda _: PLAN, rank=0, world_size=1)
    stranger.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "kv-prefetch"]


def test_endpoints_of_different_teachers_are_refused_when_the_source_is_built(bench):
    stranger = ScriptedTeacher(dataclasses.replace(INFO, weights_digest="ff" * 16))
    config = TeacherConfig(name=TEACHER, endpoints=(bench.teachers[0].endpoint, stranger.endpoint))
    with pytest.raises(TeacherMismatchError, match=stranger.endpoint):
        build_source(config, KVConfig(), lambda _: PLAN, rank=0, world_size=1)
    stranger.stop()


def test_wrapped_source_has_the_health_of_its_replicas(bench):
    source = bench.built(mode="record", store=bench.directory, control="shuffled")
    source.fetch(SAMPLES[:3])
    health = source.health()
    source.close()
    assert health is not None
    assert [one.endpoint for one in health.endpoints] == [teacher.endpoint for teacher in bench.teachers]
    assert (health.switches, health.retries) == (0, 0)
    assert health.answered_s_ago is not None


def test_a_stored_teacher_has_no_health(bench):
    source = bench.built_offline()
    assert source.health() is None
    source.close()


def test_ranks_start_with_different_endpoints(bench):
    for teacher in bench.teachers:
        teacher.requests.clear()
    for rank in range(4):
        source = build_source(bench.config(), KVConfig(prefetch=0), lambda _: PLAN, rank, world_size=4)
        source.fetch(SAMPLES[:1])
        source.close()
    assert [len(teacher.requests) for teacher in bench.teachers] == [2, 2]
