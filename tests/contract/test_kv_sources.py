"""What every KV source promises, whatever it is made of."""

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
from student_trainer.kv_sources import build_source, counters, flush, unshuffled
from student_trainer.kv_sources.base import KVSource
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.offline import OfflineSource
from student_trainer.kv_sources.prefetch import Prefetch
from student_trainer.kv_sources.record import Record
from student_trainer.kv_sources.remote import RemoteSource
from student_trainer.kv_sources.shuffled import ShuffledControl
from tests.support.kv_fakes import INFO, PLAN, MemorySource, kv_of, same_result, samples
from tests.support.scripted_teacher import ScriptedTeacher

MISSING = "s5"
SAMPLES = samples(20)
TEACHER = "math"


@dataclasses.dataclass
class Bench:
    """What the sources under test are made of; every sample but `MISSING` has K/V."""

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
        """A store of everything the teacher has."""
        store = self.directory / TEACHER
        record = Record(MemorySource(missing=[MISSING]), store, "rank0", merges_index=True)
        record.fetch(SAMPLES)
        record.close()
        return store

    def half_recorded(self) -> Record:
        """A recording that was interrupted after a while, started again."""
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


def test_it_knows_its_teacher_and_its_plan(source):
    assert source.info == INFO
    assert source.plan == PLAN


def test_every_sample_is_answered_in_order_with_the_teachers_bytes(source):
    some = [sample for sample in SAMPLES[::-1] if sample.id != MISSING]
    results = source.fetch(some)
    assert [result.sample_id for result in results] == [sample.id for sample in some]
    assert all(same_result(result, kv_of(sample)) for result, sample in zip(results, some, strict=True))


def test_a_sample_without_kv_harms_no_other(source):
    results = source.fetch(SAMPLES)
    missing = [result for result in results if isinstance(result, MissingKV)]
    assert [result.sample_id for result in missing] == [MISSING]
    assert missing[0].reason
    assert results.index(missing[0]) == 5
    assert all(same_result(result, kv_of(SAMPLES[i])) for i, result in enumerate(results) if i != 5)


def test_announced_batches_are_answered_like_any_other(source):
    batches = [SAMPLES[6:9], SAMPLES[9:12], SAMPLES[12:20]]
    for batch in batches:
        source.announce(batch)
    for batch in batches:
        assert all(
            same_result(result, kv_of(sample)) for result, sample in zip(source.fetch(batch), batch, strict=True)
        )


def test_the_same_samples_can_be_fetched_again(source):
    first, second = source.fetch(SAMPLES[:3]), source.fetch(SAMPLES[:3])
    assert all(same_result(*pair) for pair in zip(first, second, strict=True))


def test_a_sample_that_stands_twice_in_a_batch_is_answered_twice(source):
    results = source.fetch([SAMPLES[1], SAMPLES[2], SAMPLES[1]])
    assert [result.sample_id for result in results] == ["s1", "s2", "s1"]
    assert same_result(results[0], results[2])


def test_an_empty_batch_has_no_results(source):
    assert source.fetch([]) == []


def test_it_closes_twice_and_with_batches_that_nobody_fetched(source):
    source.announce(SAMPLES[:3])
    source.announce(SAMPLES[3:6])
    source.close()
    source.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "kv-prefetch"]


def test_shuffled_control_gives_every_sample_anothers_kv(bench, caplog):
    source = ShuffledControl(bench.failover())
    results = source.fetch(SAMPLES[:4])
    source.close()
    assert [result.sample_id for result in results] == ["s3", "s0", "s1", "s2"]
    assert same_result(results[1], kv_of(SAMPLES[0]))
    assert sum("ANOTHER" in record.getMessage() for record in caplog.records) == 1


def test_shuffled_control_moves_missing_kv_along():
    results = ShuffledControl(MemorySource(missing=["s0"])).fetch(SAMPLES[:3])
    assert [isinstance(result, MissingKV) for result in results] == [False, True, False]


def test_shuffled_control_refuses_a_sample_on_its_own():
    with pytest.raises(FieldError, match="at least 2 samples"):
        ShuffledControl(MemorySource()).fetch(SAMPLES[:1])


def test_shuffled_control_goes_around_everything_else(bench):
    source = bench.built(mode="record", store=bench.directory, control="shuffled")
    source.fetch(SAMPLES[:3])
    source.close()
    straight = OfflineSource(bench.directory / TEACHER, lambda _: PLAN)
    assert all(same_result(result, kv_of(SAMPLES[i])) for i, result in enumerate(straight.fetch(SAMPLES[:3])))


def test_the_true_pairs_stay_within_reach_of_a_shuffled_source(bench):
    source = bench.built(control="shuffled")
    own = [kv_of(sample) for sample in SAMPLES[:3]]
    assert all(same_result(*pair) for pair in zip(unshuffled(source).fetch(SAMPLES[:3]), own, strict=True))
    assert not any(same_result(*pair) for pair in zip(source.fetch(SAMPLES[:3]), own, strict=True))
    source.close()


def test_a_resumed_recording_asks_only_for_what_is_missing(bench):
    record = bench.half_recorded()
    inner = record.source
    assert isinstance(inner, MemorySource)
    record.announce(SAMPLES[:8])
    record.announce(SAMPLES[10:14])
    record.fetch(SAMPLES[:8])
    record.fetch(SAMPLES[10:14])
    assert inner.announced == inner.fetched == [["s4", "s5", "s6", "s7"]]
    record.close()


def test_a_batch_that_was_recorded_after_its_announcement_is_still_asked_for_as_announced(bench):
    inner = MemorySource()
    record = Record(inner, bench.directory, "rank0", merges_index=False)
    record.announce(SAMPLES[:2])
    record.announce(SAMPLES[1:3])
    record.fetch(SAMPLES[:2])
    record.fetch(SAMPLES[1:3])
    record.close()
    assert inner.fetched == inner.announced == [["s0", "s1"], ["s1", "s2"]]
    journal = (bench.directory / "rank0.jsonl").read_text().splitlines()
    assert len(journal) == 3


def test_samples_of_one_content_share_what_is_stored_but_keep_their_ids(bench):
    inner = MemorySource()
    record = Record(inner, bench.directory, "rank0", merges_index=True)
    record.fetch(SAMPLES[:1])
    twin = Sample("twin", token_ids=SAMPLES[0].token_ids)
    assert [result.sample_id for result in record.fetch([twin])] == ["twin"]
    record.close()
    offline = OfflineSource(bench.directory, lambda _: PLAN)
    assert [result.sample_id for result in offline.fetch([twin, SAMPLES[0]])] == ["twin", "s0"]
    assert inner.fetched == [["s0"]]


def test_flushed_samples_are_there_without_a_close(bench):
    source = bench.built(mode="record", store=bench.directory)
    source.fetch(SAMPLES[:3])
    flush(source)
    offline = OfflineSource(bench.directory / TEACHER, lambda _: PLAN)
    assert all(same_result(result, kv_of(SAMPLES[i])) for i, result in enumerate(offline.fetch(SAMPLES[:3])))
    source.close()


def test_offline_names_what_differs_from_the_recorded_plan(bench):
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


def test_counters_of_a_whole_chain_are_found(bench):
    source = bench.built(mode="record", store=bench.directory, control="shuffled")
    source.fetch(SAMPLES[:3])
    found = counters(source)
    source.close()
    assert found.keys() == {"stall_seconds", "switches", "retries"}
    assert found["stall_seconds"] > 0
    assert found["switches"] == found["retries"] == 0


def test_ranks_begin_with_different_endpoints(bench):
    for teacher in bench.teachers:
        teacher.requests.clear()
    for rank in range(4):
        source = build_source(bench.config(), KVConfig(prefetch=0), lambda _: PLAN, rank, world_size=4)
        source.fetch(SAMPLES[:1])
        source.close()
    assert [len(teacher.requests) for teacher in bench.teachers] == [2, 2]
