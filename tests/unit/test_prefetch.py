"""Tests of Prefetch: fetching ahead in order and up to the depth, errors per batch, and close."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from kvcore.errors import KVDistillError, TeacherRefusedError
from kvcore.types import EncodedSampleKV
from student_trainer.kv_sources.prefetch import Prefetch
from tests.support.kv_fakes import MemorySource, same_result, samples


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


def test_submitted_batches_are_fetched_before_their_results_are_requested(prefetch, inner):
    pending = prefetch.submit(samples(2, "a"))
    assert eventually(lambda: inner.fetched == [ids("a")])
    expected = MemorySource().fetch(samples(2, "a"))
    assert all(same_result(*pair) for pair in zip(pending.result(), expected, strict=True))
    assert inner.fetched == [ids("a")]


def test_at_most_depth_batches_are_fetched_ahead_in_order(prefetch, inner):
    first, *_ = [prefetch.submit(samples(2, name)) for name in "abcd"]
    assert eventually(lambda: len(inner.fetched) == 2)
    time.sleep(0.05)
    assert inner.fetched == [ids("a"), ids("b")]
    first.result()
    assert eventually(lambda: len(inner.fetched) == 3)
    time.sleep(0.05)
    assert inner.fetched == [ids("a"), ids("b"), ids("c")]


def test_at_most_so_many_bytes_are_fetched_ahead(inner):
    one_batch = sum(kv.nbytes for kv in MemorySource().fetch(samples(2, "a")) if isinstance(kv, EncodedSampleKV))
    source = Prefetch(inner, depth=64, most_bytes=2 * one_batch)
    pending = [source.submit(samples(2, name)) for name in "abcde"]
    assert eventually(lambda: len(inner.fetched) == 2)
    time.sleep(0.05)
    assert inner.fetched == [ids("a"), ids("b")]
    assert len(pending[4].result()) == 2, "a batch that a caller waits for is fetched all the same"
    pending[0].result()
    assert eventually(lambda: len(inner.fetched) == 4)
    time.sleep(0.05)
    assert inner.fetched == [ids("a"), ids("b"), ids("e"), ids("c")]
    source.close()


def test_a_batch_above_the_limit_is_fetched_alone(inner):
    source = Prefetch(inner, depth=64, most_bytes=1)
    pending = [source.submit(samples(2, name)) for name in "abc"]
    for count, one in enumerate(pending, start=1):
        assert len(one.result()) == 2
        assert len(inner.fetched) <= count + 1
    source.close()


def test_submit_does_not_block_while_the_source_blocks(prefetch, inner):
    inner.gate.clear()
    pending = [prefetch.submit(samples(2, name)) for name in "abcdefgh"]
    assert len(inner.fetched) <= 1
    inner.gate.set()
    assert [one.result()[1].sample_id for one in pending] == [f"{name}1" for name in "abcdefgh"]


def test_batch_with_a_waiting_caller_is_fetched_first(prefetch, inner):
    for name in "abc":
        prefetch.submit(samples(2, name))
    assert eventually(lambda: len(inner.fetched) == 2)
    assert prefetch.fetch(samples(2, "z"))[0].sample_id == "z0"
    assert inner.fetched == [ids("a"), ids("b"), ids("z")]


def test_results_can_be_taken_in_any_order(prefetch, inner):
    a, b, c, d = [prefetch.submit(samples(2, name)) for name in "abcd"]
    assert d.result()[0].sample_id == "d0"
    assert [one.result()[0].sample_id for one in (a, b, c)] == ["a0", "b0", "c0"]
    assert sorted(map(tuple, inner.fetched)) == sorted(tuple(ids(name)) for name in "abcd")


def test_results_taken_out_of_order_do_not_change_the_depth(prefetch, inner):
    first = [prefetch.submit(samples(2, name)) for name in "abcd"]
    for pending in reversed(first):
        pending.result()
    inner.fetched.clear()
    for name in "efgh":
        prefetch.submit(samples(2, name))
    assert eventually(lambda: len(inner.fetched) == 2)
    time.sleep(0.05)
    assert inner.fetched == [ids("e"), ids("f")]


def test_batch_submitted_twice_is_fetched_twice(prefetch, inner):
    first, second = prefetch.submit(samples(2, "a")), prefetch.submit(samples(2, "a"))
    assert same_result(first.result()[0], second.result()[0])
    assert inner.fetched == [ids("a"), ids("a")]


def test_error_is_raised_only_for_its_own_batch(prefetch, inner):
    def refuse(batch: list[str]) -> None:
        if "b0" in batch:
            raise TeacherRefusedError("fake", "plan.layers: 99 is too many")

    inner.before_fetch = refuse
    a, b, c = [prefetch.submit(samples(2, name)) for name in "abc"]
    assert a.result()[0].sample_id == "a0"
    with pytest.raises(TeacherRefusedError, match="99 is too many"):
        b.result()
    assert c.result()[0].sample_id == "c0"


def test_close_ends_the_thread_while_a_fetch_is_blocked(inner):
    prefetch = Prefetch(inner, depth=1)
    inner.gate.clear()
    a, b = prefetch.submit(samples(2, "a")), prefetch.submit(samples(2, "b"))
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(a.result)
        assert eventually(lambda: bool(inner.fetched))
        queued = pool.submit(b.result)
        time.sleep(0.05)
        prefetch.close()
        assert isinstance(running.exception(timeout=5), KVDistillError)
        assert isinstance(queued.exception(timeout=5), CancelledError)
    assert not prefetch._thread.is_alive()
    with pytest.raises(CancelledError):
        prefetch.fetch(samples(2, "c"))
