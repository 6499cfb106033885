"""The maps that callers have loaded, and how a server receives one. Used on the event loop's thread only."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterator

from google.protobuf.message import DecodeError

from kvcore.errors import FieldError, KVDistillError
from kvcore.plan import KVPlan
from kvcore.tensors.kv_map import KVMap, map_digest
from kvcore.types import TeacherInfo
from protos import kv_cache_pb2 as pb
from teacher_server.monitoring.logs import log_event
from teacher_server.sample_queue import BusyError

log = logging.getLogger(__name__)

MAX_MAPS = 64
KEPT_SECONDS = 3600.0
# A map that was named so recently is in use.
IN_USE_SECONDS = 60.0
BUSY_RETRY_MS = 500

# The next message of a call, serialised; None after the last one.
NextMessage = Callable[[], Awaitable[bytes | None]]


class UnknownMapError(KVDistillError):
    """A plan names a map that the server does not hold. The caller sends it (again)."""


class MapStore:
    """Maps by digest: at most `MAX_MAPS`, and `max_bytes` together.

    A map that no plan has named for `KEPT_SECONDS` is dropped. If room is needed, those that were not named for longest
    are dropped earlier; requests that are running keep theirs.

    Args:
        max_bytes: of all maps, and of those that are being received at the same time.
        now: the clock, in seconds.
    """

    def __init__(self, max_bytes: int, now: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._now = now
        self._receiving = 0
        # The map and the time at which it was last named, the longest ago first.
        self._maps: dict[str, tuple[KVMap, float]] = {}

    def __contains__(self, digest: str) -> bool:
        return self._touched(digest) is not None

    def named_by(self, plan: KVPlan) -> KVMap | None:
        """The map that a plan names; None if it names none.

        Raises:
            UnknownMapError: the map is not here.
            FieldError: the plan expects other layers or another shape.
        """
        if plan.map is None:
            return None
        found = self._touched(plan.map.digest)
        if found is None:
            raise UnknownMapError(f"plan.map: this server does not hold the map {plan.map.digest}; send it by LoadMap")
        found.check_plan(plan)
        return found

    @contextlib.contextmanager
    def receiving(self, size: int) -> Iterator[None]:
        """Reserve memory for a map that is being received.

        Raises:
            FieldError: no map may be that large.
            BusyError: there is no room beside others that are being received.
        """
        if not 0 < size <= self._max_bytes:
            raise FieldError("size", f"must be 1 to {self._max_bytes} bytes (max_map_bytes); got {size}")
        if self._receiving + size > self._max_bytes:
            raise BusyError(f"maps of {self._receiving} bytes are being received (max_map_bytes)", BUSY_RETRY_MS)
        self._receiving += size
        try:
            yield
        finally:
            self._receiving -= size

    def add(self, digest: str, kv_map: KVMap) -> None:
        """Keep a map, and drop others if there is no room."""
        self._maps.pop(digest, None)
        room = self._max_bytes - kv_map.nbytes
        while self._maps and (len(self._maps) >= MAX_MAPS or self._nbytes() > room):
            dropped = next(iter(self._maps))
            unused_s = self._now() - self._maps.pop(dropped)[1]
            if unused_s < IN_USE_SECONDS:
                problem = "callers send a map again for each request; raise max_map_bytes, or have runs share a kv_map"
                log_event(log, "map_in_use_dropped", level=logging.WARNING, map=dropped, problem=problem)
        self._maps[digest] = (kv_map, self._now())

    def drop_unused(self) -> None:
        """Drop the maps that no plan has named for long."""
        oldest = self._now() - KEPT_SECONDS
        self._maps = {digest: entry for digest, entry in self._maps.items() if entry[1] > oldest}

    def _touched(self, digest: str) -> KVMap | None:
        self.drop_unused()
        entry = self._maps.pop(digest, None)
        if entry is None:
            return None
        self._maps[digest] = (entry[0], self._now())
        return entry[0]

    def _nbytes(self) -> int:
        return sum(kv_map.nbytes for kv_map, _ in self._maps.values())


async def receive_map(next_message: NextMessage, store: MapStore, info: TeacherInfo) -> None:
    """Receive the messages of a `LoadMap` call, and keep the map. A map that is here already is not read.

    Raises:
        FieldError: the map is too large, damaged, or not for this teacher.
        BusyError: too many maps are being received.
    """
    first = _parsed(await next_message() or b"")
    digest, size = first.digest, first.size
    if not re.fullmatch(r"[0-9a-f]{32}", digest):
        raise FieldError("digest", f"must be 32 hexadecimal digits in the first message; got '{digest[:64]}'")
    if digest in store:
        return
    with store.receiving(size):
        pieces, received = [first.data], len(first.data)
        while received < size and (message := await next_message()) is not None:
            pieces.append(_parsed(message).data)
            received += len(pieces[-1])
        if received != size:
            raise FieldError("data", f"has {received} bytes; the first message announced {size}")
        kv_map = await asyncio.to_thread(_read, pieces, digest)
        kv_map.check_teacher(info)
        store.add(digest, kv_map)


def _read(pieces: list[bytes], digest: str) -> KVMap:
    content = b"".join(pieces)
    pieces.clear()
    found = map_digest(content)
    if found != digest:
        raise FieldError("digest", f"got {digest}; the digest of the data is {found}")
    kv_map = KVMap.read(content)
    # The name is computed once, and takes half a second for a large map: not on the event loop.
    assert kv_map.named.digest == digest, "a map's content is its file"
    return kv_map


def _parsed(message: bytes) -> pb.LoadMapRequest:
    try:
        return pb.LoadMapRequest.FromString(message)
    except DecodeError as error:
        raise FieldError("request", f"is not a valid LoadMapRequest: {error}") from error
