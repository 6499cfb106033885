"""Tests of the sample queue's fairness between callers, of admission by estimates, and of the limit on unsent bytes."""

from __future__ import annotations

import time

import pytest

from teacher_server.fair_share import Caller
from teacher_server.sample_queue import BusyError, Job
from tests.unit.test_sample_queue import ONE, OTHER, admit, indices, queue_of, stream_of


def test_a_large_sample_does_not_starve_beside_small_ones() -> None:
    queue = queue_of(max_tokens=10, max_batch_tokens=2)
    large = stream_of([9])
    queue.extend(*stream_of([2] * 5, caller=OTHER))
    queue.extend(*large)
    taken: list[list[Job]] = []
    while not taken or taken[-1] != large[1]:
        queue.extend(*stream_of([2] * 5, caller=OTHER))
        taken.append(queue.take())
        queue.done(taken[-1], 0.1)
        assert len(taken) < 10


@pytest.mark.parametrize("small_batch_tokens", [None, 0, 50], ids=["unpadded", "padded", "small batches"])
def test_two_callers_get_equal_tokens_whatever_their_number_of_streams(small_batch_tokens: int | None) -> None:
    queue = queue_of(max_tokens=10_000, max_batch_tokens=200, small_batch_tokens=small_batch_tokens)
    single = stream_of([10] * 100, caller=OTHER)
    for stream in [*(stream_of([9, 10, 11, 12] * 25) for _ in range(12)), single]:
        queue.extend(*stream)
    ran = dict.fromkeys((ONE, OTHER), 0)
    for _ in range(8):
        batch = queue.take()
        for job in batch:
            ran[job.stream.caller] += job.tokens
        queue.done(batch, 0.1)
    assert abs(ran[ONE] - ran[OTHER]) <= 200, ran


def test_room_for_tokens_is_shared_by_callers_too() -> None:
    queue = queue_of(max_tokens=130, max_batch_tokens=10)
    for _ in range(12):
        queue.extend(*stream_of([10] * 20))
    single = stream_of([10] * 100, caller=OTHER)
    queue.extend(*single)
    ran = 0
    for turn in range(60):
        batch = queue.take()
        ran += (turn >= 20) * len(indices(batch, single[0]))
        queue.done(batch, 0.1)
    assert 18 <= ran <= 22


def test_a_request_is_refused_by_its_estimate_before_its_samples_are_known() -> None:
    queue = queue_of(max_tokens=100)
    with queue.reserve(ONE, nbytes=400, tokens=80):
        queue.reserve(OTHER, nbytes=60, tokens=15)
        with pytest.raises(BusyError, match="95 tokens are queued and this request adds about 30"):
            queue.reserve(OTHER, nbytes=120, tokens=30)
    queue.reserve(OTHER, nbytes=120, tokens=30)


def test_a_reservation_grows_only_if_there_is_room() -> None:
    queue = queue_of(max_tokens=100)
    queue.reserve(ONE, nbytes=10, tokens=60)
    with queue.reserve(OTHER, nbytes=10, tokens=10) as reserved:
        reserved.add(20)
        with pytest.raises(BusyError):
            reserved.add(20)
    assert queue.reserve(OTHER, nbytes=10, tokens=40).tokens == 40


def test_a_large_request_to_an_idle_server_may_grow() -> None:
    queue = queue_of(max_tokens=100)
    with queue.reserve(ONE, nbytes=10, tokens=120) as reserved:
        reserved.add(60)
        assert reserved.tokens == 180


def test_a_large_request_does_not_starve_beside_small_ones() -> None:
    queue = queue_of(max_tokens=100, max_batch_tokens=50)
    admit(queue, *stream_of([10] * 10))
    refused = 0
    for turn in range(20):
        queue.done(queue.take(), 0.1)
        try:
            queue.reserve(OTHER, nbytes=900, tokens=90)
            break
        except BusyError:
            refused += 1
        for number in range(5):
            with pytest.raises(BusyError, match="are kept for requests that were refused before"):
                admit(queue, *stream_of([10], caller=Caller("small", str(number))))
        assert turn < 10
    assert refused == 1


def test_room_that_nobody_claims_again_is_free_later(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = queue_of(max_tokens=100)
    admit(queue, *stream_of([50]))
    with pytest.raises(BusyError):
        queue.reserve(OTHER, nbytes=900, tokens=90)
    with pytest.raises(BusyError):
        queue.reserve(ONE, nbytes=100, tokens=10)
    later = time.monotonic() + 60
    monkeypatch.setattr("teacher_server.claims.time.monotonic", lambda: later)
    assert queue.reserve(ONE, nbytes=100, tokens=10).tokens == 10


def test_a_caller_with_many_refused_requests_does_not_keep_another_out() -> None:
    queue = queue_of(max_tokens=100)
    running = [queue.reserve(ONE, nbytes=number, tokens=20) for number in range(5)]
    for number in range(10, 22):
        with pytest.raises(BusyError):
            queue.reserve(ONE, nbytes=number, tokens=20)
    with pytest.raises(BusyError):
        queue.reserve(OTHER, nbytes=1, tokens=20)
    running[0].queue.resize(running[0], 0)
    with pytest.raises(BusyError):
        queue.reserve(ONE, nbytes=10, tokens=20)
    assert queue.reserve(OTHER, nbytes=1, tokens=20).tokens == 20


def test_unsent_bytes_of_all_streams_together_are_limited() -> None:
    queue = queue_of(window_bytes=400, max_unsent_bytes=2000)
    stalled = [stream_of([1] * 100, nbytes=10) for _ in range(16)]
    for stream in stalled:
        queue.extend(*stream)
        while queue.ready_samples:
            queue.done(queue.take(), 0.1)
    unsent = [stream.unsent for stream, _ in stalled]
    assert 1000 < sum(unsent) <= 2000
    assert unsent == sorted(unsent, reverse=True)
    assert min(unsent) > 0
    large = stream_of([1], nbytes=2000 - sum(unsent) + 10)
    queue.extend(*large)
    assert queue.ready_samples == 0
    queue.remove(stalled[0][0])
    assert large[1][0] in queue.take()
