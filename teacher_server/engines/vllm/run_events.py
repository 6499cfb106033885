"""Gives the events of vLLM's workers and scheduler to the batches that they belong to."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence

from teacher_server.engines.vllm.batch_progress import Ended
from teacher_server.engines.vllm.message_queue import Message

Events = queue.SimpleQueue[Message | Ended]


class RunEvents:
    """The queues of the batches that run, by the names of their requests. Any thread may call its methods."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[str, Events] = {}

    @contextlib.contextmanager
    def of_run(self, tags: Sequence[str]) -> Iterator[Events]:
        """Collect the events of these requests inside the block. Later ones are dropped.

        A batch can get messages that have requests of other batches too, because vLLM computes them in one pass.
        """
        events: Events = queue.SimpleQueue()
        with self._lock:
            self._queues |= dict.fromkeys(tags, events)
        try:
            yield events
        finally:
            with self._lock:
                for tag in tags:
                    del self._queues[tag]

    def deliver(self, event: Message | Ended) -> None:
        """Give an event to every batch that it is about."""
        tags = [event.tag] if isinstance(event, Ended) else event.tags
        with self._lock:
            receivers = {id(found): found for tag in tags if (found := self._queues.get(tag)) is not None}
        for events in receivers.values():
            events.put(event)
