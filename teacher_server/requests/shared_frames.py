"""The memory that a server shares with clients on its machine, and how large bodies take this way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from kvcore.wire.frames import body_of, with_shared_body
from kvcore.wire.shared_memory import MAX_SLOTS, MEMORY_METADATA, MIN_SHARED_BYTES, Layout, SharedSlots, supported
from protos import kv_cache_pb2 as pb
from teacher_server.monitoring.activity import Call
from teacher_server.monitoring.logs import log_event
from teacher_server.requests.peers import on_this_machine

log = logging.getLogger(__name__)

# How long a client may take to open its memory.
OPEN_SECONDS = 10.0

Send = Callable[[bytes], Awaitable[None]]


@dataclass(slots=True)
class _Shared:
    """Memory of one client. `named`: whether a request has named it, so that the client has opened it."""

    slots: SharedSlots
    offered: float
    named: bool = False


class SharedFrames:
    """The memory of all clients. Used on the event loop's thread only.

    Args:
        total_bytes: of all clients; 0 if no memory is shared.
        client_bytes: of one client.
        frame_bytes: the largest body of a frame.
        now: the clock, in seconds.
    """

    def __init__(
        self, total_bytes: int, client_bytes: int, frame_bytes: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._total_bytes = total_bytes
        self._layout = Layout(min(MAX_SLOTS, client_bytes // frame_bytes), frame_bytes)
        # Without the page that describes the slots.
        self._client_bytes = self._layout.slots * frame_bytes
        self._now = now
        self._reserved = 0
        self._shared: dict[str, _Shared] = {}
        self._making: set[asyncio.Task[pb.OpenMemoryResponse]] = set()
        self._reported = False

    @property
    def nbytes(self) -> int:
        """Bytes that clients share now."""
        return self._reserved

    async def offer(self, peer: str) -> pb.OpenMemoryResponse:
        """Memory for a new client, or why there is none. If the call is cancelled, the memory is freed as unopened.

        Args:
            peer: the client, as gRPC names it. On another machine it could not open the memory, so it gets none.
        """
        if not on_this_machine(peer):
            return pb.OpenMemoryResponse(problem="the caller is not on the server's machine")
        # A task of its own, so that memory which a thread still makes is counted, and freed later.
        making = asyncio.create_task(self._made())
        self._making.add(making)
        making.add_done_callback(self._making.discard)
        return await asyncio.shield(making)

    async def _made(self) -> pb.OpenMemoryResponse:
        self.drop_unused()
        size = self._client_bytes
        if not self._total_bytes:
            return pb.OpenMemoryResponse(problem="the server shares no memory (shared_memory_bytes is 0)")
        if self._reserved + size > self._total_bytes:
            used = f"{self._reserved} of {self._total_bytes} bytes are in use (shared_memory_bytes)"
            return self._none(f"no shared memory is left for {size} bytes: {used}")
        if not supported():
            return self._none("the server's system has no memfd")
        self._reserved += size
        try:
            slots = await asyncio.to_thread(SharedSlots, self._layout, self._now)
        except BaseException as error:
            self._reserved -= size
            if isinstance(error, OSError):
                return self._none(f"the system has no {size} bytes of shared memory: {error.strerror}")
            raise
        self._shared[slots.key] = _Shared(slots, self._now())
        return slots.offer()

    def named_by(self, metadata: Iterable[tuple[str, str | bytes]]) -> SharedSlots | None:
        """The memory whose key a request has; None without a key, or with one that is not known (any more)."""
        key = dict(metadata).get(MEMORY_METADATA)
        shared = self._shared.get(key) if isinstance(key, str) else None
        if shared is None:
            return None
        shared.named = True
        return shared.slots

    def drop_unused(self) -> None:
        """Free the memory of clients that have ended, or have not opened it in time."""
        oldest = self._now() - OPEN_SECONDS
        for key, shared in list(self._shared.items()):
            if (shared.named or shared.offered <= oldest) and not shared.slots.is_open():
                self._drop(key)

    def close(self) -> None:
        """Free all memory."""
        for key in list(self._shared):
            self._drop(key)

    def _drop(self, key: str) -> None:
        self._shared.pop(key).slots.close()
        self._reserved -= self._client_bytes

    def _none(self, problem: str) -> pb.OpenMemoryResponse:
        if not self._reported:
            self._reported = True
            log_event(log, "no_shared_memory", problem=problem)
        return pb.OpenMemoryResponse(problem=problem)


def through_memory(send: Send, slots: SharedSlots, call: Call) -> Send:
    """A sender that puts large bodies into free slots, and sends other frames as they are.

    Args:
        send: sends a frame.
        slots: the caller's.
        call: counts the bytes in shared memory.
    """

    async def send_shared(frame: bytes) -> None:
        frame, shared_bytes = with_body_in(slots, frame)
        call.shared_bytes += shared_bytes
        await send(frame)

    return send_shared


def with_body_in(slots: SharedSlots, frame: bytes) -> tuple[bytes, int]:
    """The frame with its body in a slot, if it is large and a slot is free, and the bytes that the slot holds."""
    if len(frame) < MIN_SHARED_BYTES:
        return frame, 0
    body = body_of(frame)
    place = slots.put(body) if len(body) >= MIN_SHARED_BYTES else None
    return (frame, 0) if place is None else (with_shared_body(frame, place), len(body))
