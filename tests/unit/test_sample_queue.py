"""Tests of the sample queue: turns of callers and streams, batches by padded tokens, limits on tokens and bytes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.plan import KVPlan, SamplingParams
from kvcore.types import Sample
from teacher_server.engines.base import PlannedSample, TokenizedSample
from teacher_server.fair_share import Caller
from teacher_server.sample_queue import BusyError, ClientStream, Job, SampleQueue, Sink
from tests.support.servers import wait_until

PLAN = KVPlan(layers=(0,))
NO_SINK = cast("Sink", None)
ONE, OTHER = Caller("one", "one:1"), Caller("other", "other:1")


def stream_of(tokens: Sequence[int], nbytes: int = 10, caller: Caller = ONE) -> tuple[ClientStream, list[Job]]:
    """A stream of samples with these token counts."""
    stream = ClientStream(NO_SINK, caller=caller)
    return stream, [Job(stream, index, PlannedSample(read(count), PLAN), nbytes) for index, count in enumerate(tokens)]


def prompts_of(tokens: Sequence[int], new: int, seed: int = 0) -> tuple[ClientStream, list[Job]]:
    """A stream of prompts with these token counts."""
    stream, jobs = stream_of(tokens, nbytes=0)
    for job in jobs:
        job.sampling = SamplingParams(max_new_tokens=new, temperature=1.0, seed=seed)
    return stream, jobs


def read(tokens: int) -> TokenizedSample:
    ids = tuple(range(tokens))
    return TokenizedSample(Sample("x", token_ids=ids), ids, ids, ids)


def queue_of(
    max_tokens: int = 1000,
    max_batch_tokens: int = 1000,
    window_bytes: int = 1000,
    small_batch_tokens: int | None = None,
    max_unsent_bytes: int = 1_000_000,
) -> SampleQueue:
    """A queue; by default for an engine that does not pad."""
    return SampleQueue(max_tokens, max_batch_tokens, window_bytes, max_unsent_bytes, small_batch_tokens)


def admit(queue: SampleQueue, stream: ClientStream, jobs: Sequence[Job]) -> None:
    """Queue a request whose estimate is right."""
    tokens = sum(job.tokens for job in jobs)
    with queue.reserve(stream.caller, nbytes=10 * tokens, tokens=tokens):
        pass
    queue.extend(stream, jobs)


def indices(batch: Sequence[Job], stream: ClientStream) -> list[int]:
    return [job.index for job in batch if job.stream is stream]


def test_all_threads_that_wait_get_a_batch() -> None:
    queue = queue_of(max_batch_tokens=4)
    taken: list[list[Job]] = []
    threads = [threading.Thread(target=lambda: taken.append(queue.take()), daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(queue._changed._waiters) == 3)  # type: ignore[attr-defined]
    admit(queue, *stream_of([4] * 3))
    for thread in threads:
        thread.join(20)
    assert sorted(job.index for batch in taken for job in batch) == [0, 1, 2]


def test_batches_that_run_at_the_same_time_share_the_engines_speed() -> None:
    queue = queue_of(max_tokens=200, max_batch_tokens=100)
    stream, jobs = stream_of([100, 100])
    admit(queue, stream, jobs)
    for batch in (queue.take(), queue.take()):
        queue.done(batch, seconds=0.4)
    admit(queue, *stream_of([200]))
    with pytest.raises(BusyError) as refused:
        queue.reserve(ONE, nbytes=1000, tokens=100)
    # Two batches of 100 tokens in 0.4 s, and then one: 500 and 250 tokens per second.
    assert refused.value.retry_ms == int(1000 * 100 / 375)


def test_streams_take_turns_and_keep_their_own_order() -> None:
    queue = queue_of(max_batch_tokens=4)
    big, small = stream_of([1] * 6), stream_of([1] * 2)
    admit(queue, *big)
    admit(queue, *small)
    first, second = queue.take(), queue.take()
    assert (indices(first, big[0]), indices(first, small[0])) == ([0, 1], [0, 1])
    assert indices(second, big[0]) == [2, 3, 4, 5]


def test_batch_tokens_include_padding() -> None:
    queue = queue_of(max_batch_tokens=20)
    admit(queue, *stream_of([5, 5, 10, 1]))
    # Three samples padded to 10 tokens are 30, over the limit. The fourth would fit but must not overtake.
    assert [job.tokens for job in queue.take()] == [5, 5]
    assert [job.tokens for job in queue.take()] == [10, 1]


def test_sample_longer_than_a_batch_runs_alone() -> None:
    queue = queue_of(max_batch_tokens=4)
    admit(queue, *stream_of([9, 1]))
    assert [job.tokens for job in queue.take()] == [9]
    assert [job.tokens for job in queue.take()] == [1]


def test_full_queue_refuses_with_a_retry_time_from_the_measured_speed() -> None:
    queue = queue_of(max_tokens=100, max_batch_tokens=50)
    admit(queue, *stream_of([50, 50]))
    with pytest.raises(BusyError) as unmeasured:
        admit(queue, *stream_of([50]))
    assert unmeasured.value.retry_ms == 1000
    queue.done(queue.take(), seconds=0.1)
    admit(queue, *stream_of([50]))
    with pytest.raises(BusyError) as measured:
        admit(queue, *stream_of([100]))
    assert measured.value.retry_ms == 200  # 100 tokens over the limit at 500 tokens per second


def test_idle_queue_admits_a_request_of_any_size() -> None:
    queue = queue_of(max_tokens=10)
    admit(queue, *stream_of([6, 6, 6]))
    assert (queue.tokens, queue.ready_samples) == (6, 1)
    batch = queue.take()
    assert (queue.tokens, queue.ready_samples) == (6, 0)
    queue.done(batch, 0.1)
    assert [job.index for job in queue.take()] == [1]


def test_stream_with_a_full_window_does_not_block_others() -> None:
    queue = queue_of(window_bytes=25)
    stalled, other = stream_of([1] * 4, nbytes=10), stream_of([1] * 2, nbytes=10)
    admit(queue, *stalled)
    queue.done(queue.take(), 0.1)
    assert (stalled[0].unsent, queue.ready_samples) == (20, 0)
    admit(queue, *other)
    assert indices(queue.take(), other[0]) == [0, 1]
    queue.release(stalled[0], 10)
    assert indices(queue.take(), stalled[0]) == [2]


def test_response_larger_than_the_window_runs_alone() -> None:
    queue = queue_of(window_bytes=25)
    stream, jobs = stream_of([1, 1], nbytes=100)
    admit(queue, stream, jobs)
    assert len(queue.take()) == 1
    queue.release(stream, 100)
    assert len(queue.take()) == 1


def test_removing_a_stream_removes_its_waiting_samples() -> None:
    queue = queue_of(max_tokens=10, max_batch_tokens=4)
    leaving, staying = stream_of([4, 4, 4]), stream_of([2])
    admit(queue, *leaving)
    batch = queue.take()
    queue.remove(leaving[0])
    assert leaving[0].gone
    assert (queue.tokens, queue.ready_samples) == (4, 0)  # running samples still count
    admit(queue, *staying)
    assert indices(queue.take(), staying[0]) == [0]
    queue.done(batch, 0.1)
    assert queue.tokens == 2


def test_removing_a_stream_makes_room_for_others() -> None:
    queue = queue_of(max_tokens=10, max_batch_tokens=2)
    leaving, waiting = stream_of([3]), stream_of([9])
    admit(queue, *leaving)
    queue.extend(*waiting)
    assert (queue.tokens, queue.ready_samples) == (3, 1)
    queue.remove(leaving[0])
    assert indices(queue.take(), waiting[0]) == [0]


def test_close_wakes_a_waiting_take() -> None:
    queue = queue_of()
    taken: list[list[Job]] = []
    waiting = threading.Thread(target=lambda: taken.append(queue.take()))
    waiting.start()
    queue.close()
    waiting.join(10)
    assert taken == [[]]


@given(
    requests=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=1, max_size=6),
    max_tokens=st.integers(12, 40),
    max_batch_tokens=st.integers(1, 40),
    window_bytes=st.integers(1, 60),
    small_batch_tokens=st.none() | st.integers(0, 20),
)
def test_every_admitted_sample_runs_once_within_all_limits(
    requests: list[list[int]],
    max_tokens: int,
    max_batch_tokens: int,
    window_bytes: int,
    small_batch_tokens: int | None,
) -> None:
    queue = queue_of(max_tokens, max_batch_tokens, window_bytes, small_batch_tokens)
    ran: dict[ClientStream, list[int]] = {}
    admitted: dict[ClientStream, int] = {}
    for lengths in requests:
        stream, jobs = stream_of(lengths, nbytes=7)
        try:
            admit(queue, stream, jobs)
        except BusyError:
            continue
        admitted[stream], ran[stream] = len(jobs), []
    while queue.ready_samples:
        batch = queue.take()
        padded, tokens = len(batch) * max(job.tokens for job in batch), sum(job.tokens for job in batch)
        assert len(batch) == 1 or padded <= max_batch_tokens
        if small_batch_tokens is not None:
            assert padded <= small_batch_tokens or padded - tokens <= 0.05 * padded
        assert queue.tokens <= max_tokens
        for job in batch:
            ran[job.stream].append(job.index)
            assert job.stream.unsent <= max(window_bytes, 7)
        queue.done(batch, 0.01)
        for job in batch:
            queue.release(job.stream, job.nbytes)
    order = {stream: indices if small_batch_tokens is None else sorted(indices) for stream, indices in ran.items()}
    assert {stream: list(range(count)) for stream, count in admitted.items()} == order
    assert queue.tokens == 0


def lengths(batch: Sequence[Job]) -> list[int]:
    return [job.tokens for job in batch]


def test_a_request_is_split_into_batches_of_similar_length() -> None:
    queue = queue_of(small_batch_tokens=0)
    admit(queue, *stream_of([100, 40, 98, 41, 96, 40]))
    assert lengths(queue.take()) == [100, 98, 96]
    assert lengths(queue.take()) == [40, 41, 40]


def test_samples_of_several_streams_share_a_batch_by_length() -> None:
    queue = queue_of(small_batch_tokens=0)
    first, second = stream_of([50, 90]), stream_of([90, 51])
    admit(queue, *first)
    admit(queue, *second)
    batches = [queue.take(), queue.take()]
    assert [(indices(batch, first[0]), indices(batch, second[0])) for batch in batches] == [([0], [1]), ([1], [0])]
    assert queue.ready_samples == 0


def test_a_batch_takes_the_nearest_lengths_within_the_limit_of_padded_tokens() -> None:
    queue = queue_of(max_batch_tokens=410, small_batch_tokens=0)
    admit(queue, *stream_of([100, 96, 97, 98, 99, 101]))
    assert lengths(queue.take()) == [100, 98, 99, 101]  # 404 padded tokens; a fifth sample would make 505
    assert lengths(queue.take()) == [96, 97]


def test_a_small_batch_takes_samples_of_any_length() -> None:
    queue = queue_of(small_batch_tokens=40)
    admit(queue, *stream_of([10, 4, 20, 2]))
    assert lengths(queue.take()) == [10, 4, 2]
    assert lengths(queue.take()) == [20]


def test_an_unusual_length_waits_for_its_turn_only() -> None:
    queue = queue_of(small_batch_tokens=0)
    busy, odd = stream_of([10] * 3), stream_of([10, 33])
    admit(queue, *busy)
    admit(queue, *odd)
    taken: list[list[int]] = []
    for _ in range(4):
        more = stream_of([10] * 3)
        admit(queue, *more)
        batch = queue.take()
        taken.append(indices(batch, odd[0]))
        queue.done(batch, 0.1)
    # Its stream has the second turn, after the first batch has taken all samples of the usual length.
    assert taken[:2] == [[0], [1]]


def test_streams_with_unusual_lengths_take_turns() -> None:
    queue = queue_of(max_batch_tokens=100, small_batch_tokens=0)
    big, small = stream_of([10] * 40), stream_of([50, 80])
    admit(queue, *big)
    admit(queue, *small)
    batches = [queue.take() for _ in range(4)]
    assert [indices(batch, small[0]) for batch in batches] == [[], [0], [], [1]]
    assert [len(batch) for batch in batches] == [10, 1, 10, 1]


def test_prompts_share_a_batch_whatever_their_lengths() -> None:
    queue = queue_of(small_batch_tokens=0)
    prompts, samples = prompts_of([10, 90, 40], new=5), stream_of([10, 90])
    admit(queue, *prompts)
    admit(queue, *samples)
    assert lengths(queue.take()) == [15, 95, 45]
    assert [lengths(queue.take()) for _ in range(2)] == [[10], [90]]


def test_max_new_tokens_count_as_tokens() -> None:
    queue = queue_of(max_tokens=100, max_batch_tokens=60)
    admit(queue, *prompts_of([10, 10, 10], new=20))
    assert queue.tokens == 90
    with pytest.raises(BusyError):
        admit(queue, *prompts_of([1], new=20))
    assert [job.tokens for job in queue.take()] == [30, 30]


def test_batch_has_one_kind_and_skipped_streams_are_next() -> None:
    queue = queue_of(max_batch_tokens=4)
    samples, prompts, others = stream_of([1] * 6), prompts_of([1] * 3, new=1), prompts_of([1], new=1, seed=1)
    for stream in (samples, prompts, others):
        admit(queue, *stream)
    batches = [queue.take() for _ in range(5)]
    assert [[job.sampling for job in batch] for batch in batches] == [
        [None] * 4,
        [prompts[1][0].sampling] * 2,
        [others[1][0].sampling],
        [None] * 2,
        [prompts[1][0].sampling],
    ]


def test_extended_samples_wait_instead_of_being_refused() -> None:
    queue = queue_of(max_tokens=20, max_batch_tokens=20)
    first, second = prompts_of([5], new=10), stream_of([20])
    admit(queue, *first)
    batch = queue.take()
    following, jobs = stream_of([12])
    queue.extend(following, jobs)
    assert queue.ready_samples == 0
    with pytest.raises(BusyError):
        admit(queue, *second)
    queue.done(batch, 1.0)
    assert queue.take() == jobs


def test_removed_stream_is_not_extended() -> None:
    queue = queue_of()
    stream, jobs = stream_of([5])
    queue.remove(stream)
    queue.extend(stream, jobs)
    assert (queue.tokens, queue.ready_samples) == (0, 0)
