"""Events of vLLM reach the batches that they are about, and no others."""

from __future__ import annotations

import queue

import torch

from teacher_server.engines.vllm.batch_progress import Ended
from teacher_server.engines.vllm.message_queue import FailureMessage, LayerMessage
from teacher_server.engines.vllm.run_events import Events, RunEvents


def layer(*tags: str) -> LayerMessage:
    return LayerMessage(list(tags), 0, 0, 1, {}, torch.zeros(len(tags), 1, 1, dtype=torch.int32), {}, {}, 0.0)


def drained(events: Events) -> list[object]:
    found: list[object] = []
    while True:
        try:
            found.append(events.get_nowait())
        except queue.Empty:
            return found


def test_a_message_about_two_batches_reaches_each_of_them_once() -> None:
    runs = RunEvents()
    with runs.of_run(["a", "b"]) as first, runs.of_run(["c"]) as second:
        both, own, ended = layer("a", "b", "c"), FailureMessage(["b"], "too large"), Ended("c", None)
        for event in (both, own, ended):
            runs.deliver(event)
        assert drained(first) == [both, own]
        assert drained(second) == [both, ended]


def test_events_of_a_batch_that_has_ended_are_dropped() -> None:
    runs = RunEvents()
    with runs.of_run(["a"]) as first, runs.of_run(["b"]) as second:
        pass
    with runs.of_run(["c"]) as third:
        for tag in "abc":
            runs.deliver(Ended(tag, None))
        assert [drained(events) for events in (first, second, third)] == [[], [], [Ended("c", None)]]
