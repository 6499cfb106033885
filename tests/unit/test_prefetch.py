"""Batches are fetched ahead, in order, within the depth, and errors reach the fetch they belong to."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from kvcore.errors import KVDistillError, TeacherRefusedError
from kvcore.types import Sample
from student_trainer.kv_sources.prefetch import Prefetch
from tests.support.kv_fakes import MemorySource, kv_of, same_result, samples


@pytest.fixture
def inner() -> MemorySource:
    return MemorySource()


@pytest.fixture
def prefetch(inner: MemorySource) -> Iterator[Prefetch]:
    source = Prefetch(inner, depth=2)
    yield source
    source.close()


def ids(name: str) -> list[str]:
    return [f"{name}0", f"{name}1"]


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def test_announced_batches_are_fetched_before_anybody_asks(prefetch, inner):
    prefetch.announce(samples(2, "a"))
    assert eventually(lambda: inner.fetched == [ids("a")])
    results = prefetch.fetch(samples(2, "a"))
    assert all(same_result(*pair) for pair in zip(results, MemorySource().fetch(samples(2, "a")), strict=True))
    assert inner.fetched == [ids("a")]


def test_no_more_than_depth_batches_are_ahead_and_the_rest_follow_in_order(prefetch, inner):
    for name in "abcd":
        prefetch.announce(samples(2, name))
    assert eventually(lambda: len(inner.fetched) == 2)
    time.sleep(0.05)
    assert inner.fetched == [ids("a"), ids("b")]
    prefetch.fetch(samples(2, "a"))
    assert eventually(lambda: len(inner.fetched) == 3)
    time.sleep(0.05)
    assert inner.fetched == [ids("a"), ids("b"), ids("c")]


def test_announcing_never_blocks_while_the_source_does(prefetch, inner):
    inner.gate.clear()
    for name in "abcdefgh":
        prefetch.announce(samples(2, name))
    assert len(inner.fetched) <= 1
    inner.gate.set()
    assert [prefetch.fetch(samples(2, name))[1].sample_id for name in "abcdefgh"] == [f"{name}1" for name in "abcdefgh"]


def test_a_batch_nobody_announced_overtakes_those_nobody_waits_for(prefetch, inner):
    for name in "abc":
        prefetch.announce(samples(2, name))
    assert eventually(lambda: len(inner.fetched) == 2)
    assert prefetch.fetch(samples(2, "z"))[0].sample_id == "z0"
    assert inner.fetched == [ids("a"), ids("b"), ids("z")]


def test_a_later_announced_batch_can_be_fetched_first(prefetch, inner):
    for name in "abcd":
        prefetch.announce(samples(2, name))
    assert prefetch.fetch(samples(2, "d"))[0].sample_id == "d0"
    assert [prefetch.fetch(samples(2, name))[0].sample_id for name in "abc"] == ["a0", "b0", "c0"]
    assert sorted(map(tuple, inner.fetched)) == sorted(tuple(ids(name)) for name in "abcd")


def test_the_same_batch_announced_twice_is_fetched_twice(prefetch, inner):
    prefetch.announce(samples(2, "a"))
    prefetch.announce(samples(2, "a"))
    first, second = prefetch.fetch(samples(2, "a")), prefetch.fetch(samples(2, "a"))
    assert same_result(first[0], second[0])
    assert inner.fetched == [ids("a"), ids("a")]


def test_another_grouping_of_announced_samples_is_another_batch(prefetch, inner):
    prefetch.announce(samples(4))
    results = prefetch.fetch(samples(4)[::-1])
    assert [result.sample_id for result in results] == ["s3", "s2", "s1", "s0"]


def test_an_error_in_the_background_is_raised_by_the_fetch_it_belongs_to(prefetch, inner):
    def refuse(batch: list[str]) -> None:
        if "b0" in batch:
            raise TeacherRefusedError("fake", "plan.layers: 99 is too many")

    inner.before_fetch = refuse
    for name in "abc":
        prefetch.announce(samples(2, name))
    assert prefetch.fetch(samples(2, "a"))[0].sample_id == "a0"
    with pytest.raises(TeacherRefusedError, match="99 is too many"):
        prefetch.fetch(samples(2, "b"))
    assert prefetch.fetch(samples(2, "c"))[0].sample_id == "c0"


def test_a_batch_with_the_ids_of_an_announced_one_gets_its_own_content(prefetch):
    training = samples(1, "a")
    validation = [Sample(sample.id, token_ids=(7, 8, 9)) for sample in training]
    prefetch.announce(training)
    assert prefetch.fetch(validation)[0].key == kv_of(validation[0]).key
    assert prefetch.fetch(training)[0].key == kv_of(training[0]).key


def test_stall_counts_the_time_that_fetch_blocked(prefetch, inner):
    prefetch.announce(samples(2, "a"))
    assert eventually(lambda: prefetch._announced[tuple(samples(2, "a"))][0].future.done())
    prefetch.fetch(samples(2, "a"))
    at_once = prefetch.stall_seconds
    inner.gate.clear()
    threading.Timer(0.2, inner.gate.set).start()
    prefetch.fetch(samples(2, "b"))
    assert prefetch.stall_seconds - at_once >= 0.19
    assert at_once < prefetch.stall_seconds - at_once


def test_close_ends_the_thread_while_a_fetch_is_blocked(inner):
    prefetch = Prefetch(inner, depth=1)
    inner.gate.clear()
    prefetch.announce(samples(2, "a"))
    prefetch.announce(samples(2, "b"))
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(prefetch.fetch, samples(2, "a"))
        assert eventually(lambda: bool(inner.fetched))
        queued = pool.submit(prefetch.fetch, samples(2, "b"))
        time.sleep(0.05)
        prefetch.close()
        assert isinstance(running.exception(timeout=5), KVDistillError)
        assert isinstance(queued.exception(timeout=5), CancelledError)
    assert not prefetch._thread.is_alive()
    with pytest.raises(CancelledError):
        prefetch.fetch(samples(2, "c"))
