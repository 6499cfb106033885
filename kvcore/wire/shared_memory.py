"""Memory that a teacher server shares with a client on the same machine, for the bodies of large frames.

The memory is a memfd, so it has no name in a file system, and the kernel frees it when both processes have ended,
however they end. The client opens it as /proc/PID/fd/FD, which the kernel allows to processes of the same user. Its
content: a random key, which only a process that sees this memory can know; then for each slot the generation that the
server wrote last and the generation that the client released last (native uint64); then the slots.

A slot is free when its two generations are equal, or when its lease has expired. The server writes the new generation
before the body, and the client compares it after copying the body, so a body that was replaced meanwhile is noticed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvcore.errors import ProtocolError
from protos import kv_cache_pb2 as pb

# Metadata of a request: the key of the memory that the client has opened. Initial metadata of the answer: `USED`.
MEMORY_METADATA = "kvdistill-memory"
USED = "used"

# Smaller bodies stay in the stream: for them the message costs more than the copies. In a prototype, frames of 64 KiB
# took more CPU time than in the stream, and frames of 1 MiB a third of it (docs/benchmarks.md).
MIN_SHARED_BYTES = 256 << 10
# How long a slot belongs to a body that the client has not read. A client reads a frame within milliseconds.
LEASE_SECONDS = 30.0
MAX_SLOTS = 32

_KEY_BYTES = 32
# A page, so that slots begin at one.
_CONTROL_BYTES = 4096
_NAME = re.compile(r"kvdistill-[0-9a-f]{32}")


def supported() -> bool:
    """Whether this system has memfds, and seals against changes of their size."""
    return hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")


# The size never changes, so that no access can fail.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if supported() else 0


class NoSharedMemoryError(Exception):
    """The two processes cannot share memory."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The number of slots, and the bytes of one."""

    slots: int
    slot_bytes: int

    @property
    def nbytes(self) -> int:
        """Size of the whole memory."""
        return _CONTROL_BYTES + self.slots * self.slot_bytes

    def slot(self, memory: memoryview, number: int, size: int) -> memoryview:
        """The first `size` bytes of a slot."""
        start = _CONTROL_BYTES + number * self.slot_bytes
        return memory[start : start + size]

    def generations(self, memory: memoryview) -> tuple[memoryview, memoryview]:
        """The generations that were written, and those that were released: uint64 [slots]."""
        words = memory[_KEY_BYTES : _KEY_BYTES + 16 * self.slots].cast("Q")
        return words[: self.slots], words[self.slots :]


class SharedSlots:
    """The server's side: puts bodies into slots that are free. Used by one thread at a time, if `supported`.

    Args:
        layout: at most `MAX_SLOTS` slots.
        now: the clock, in seconds.

    Raises:
        OSError: the system has no such memory.
    """

    def __init__(self, layout: Layout, now: Callable[[], float] = time.monotonic) -> None:
        assert 0 < layout.slots <= MAX_SLOTS
        self._layout, self._now = layout, now
        self._name = f"kvdistill-{secrets.token_hex(16)}"
        self._fd = os.memfd_create(self._name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(self._fd, 0o600)
            # Otherwise a page that the system cannot provide later would end the process.
            os.posix_fallocate(self._fd, 0, layout.nbytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._memory = memoryview(mmap.mmap(self._fd, layout.nbytes))
        except BaseException:
            os.close(self._fd)
            raise
        self._memory[:_KEY_BYTES] = key = secrets.token_bytes(_KEY_BYTES)
        self._written, self._released = layout.generations(self._memory)
        # The server's own: what the client writes into the memory cannot confuse it.
        self._generations = [0] * layout.slots
        self._expires = [0.0] * layout.slots
        self.key = key.hex()

    def offer(self) -> pb.OpenMemoryResponse:
        """What a client needs to open the memory."""
        slots, slot_bytes = self._layout.slots, self._layout.slot_bytes
        return pb.OpenMemoryResponse(pid=os.getpid(), fd=self._fd, name=self._name, slots=slots, slot_bytes=slot_bytes)

    def put(self, body: memoryview) -> pb.SharedBody | None:
        """Copies a body into a free slot; returns None if there is none, or if the body is larger than a slot."""
        slot = self._free_slot()
        if slot is None or len(body) > self._layout.slot_bytes:
            return None
        self._generations[slot] += 1
        self._written[slot] = self._generations[slot]
        self._layout.slot(self._memory, slot, len(body))[:] = body
        self._expires[slot] = self._now() + LEASE_SECONDS
        return pb.SharedBody(slot=slot, generation=self._generations[slot], size=len(body))

    def is_open(self) -> bool:
        """Whether a client has opened the memory and still runs: it holds a lock, which ends with its process."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False

    def close(self) -> None:
        """No client can open the memory any more. It is freed when nothing uses it."""
        os.close(self._fd)

    def _free_slot(self) -> int | None:
        """The lowest one, whose memory is the likeliest to be in the processor's cache."""
        now = self._now()
        for slot, generation in enumerate(self._generations):
            if self._released[slot] == generation or self._expires[slot] <= now:
                return slot
        return None


class OpenedSlots:
    """The client's side: reads bodies and releases their slots. The memory is freed with this object.

    Args:
        offer: the server's.

    Raises:
        NoSharedMemoryError: the memory cannot be opened, or is not the server's.
    """

    def __init__(self, offer: pb.OpenMemoryResponse) -> None:
        if not (0 < offer.slots <= MAX_SLOTS and offer.slot_bytes > 0):
            raise NoSharedMemoryError(f"the server offers {offer.slots} slots of {offer.slot_bytes} bytes")
        self._layout = Layout(offer.slots, offer.slot_bytes)
        self._memory = _mapped(offer, self._layout.nbytes)
        self._written, self._released = self._layout.generations(self._memory)
        self.key = bytes(self._memory[:_KEY_BYTES]).hex()

    @property
    def nbytes(self) -> int:
        """Size of the memory."""
        return self._layout.nbytes

    def read(self, place: pb.SharedBody) -> bytes:
        """Copies a body and releases its slot.

        Raises:
            ProtocolError: the place is outside the memory, or the body was replaced after its lease had expired.
        """
        slot, size = place.slot, place.size
        if slot >= self._layout.slots or not 0 < size <= self._layout.slot_bytes:
            raise ProtocolError(
                f"a body of {size} bytes in slot {slot} of the shared memory, which has {self._layout.slots} slots of "
                f"{self._layout.slot_bytes} bytes"
            )
        body = bytes(self._layout.slot(self._memory, slot, size))
        if self._written[slot] != place.generation:
            raise ProtocolError(f"slot {slot} of the shared memory has another body: it was read too late")
        self._released[slot] = place.generation
        return body

    def release_all(self) -> None:
        """Frees the slots of bodies that no one will read, as after a cancelled request."""
        self._released[:] = self._written


def _mapped(offer: pb.OpenMemoryResponse, nbytes: int) -> memoryview:
    path = f"/proc/{offer.pid}/fd/{offer.fd}"
    try:
        fd = _opened(path, offer.name)
    except OSError as error:
        raise NoSharedMemoryError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        if status.st_uid != os.geteuid() or status.st_size != nbytes or not sealed:
            raise NoSharedMemoryError(f"{path} is not this user's memory of {nbytes} bytes")
        # The mapping keeps a copy of the descriptor, and with it the lock.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return memoryview(mmap.mmap(fd, nbytes))
    except OSError as error:
        raise NoSharedMemoryError(f"{path} cannot be mapped: {error.strerror}") from error
    finally:
        os.close(fd)


def _opened(path: str, name: str) -> int:
    """Opens the memory of this name for reading and writing; returns its descriptor."""
    # In another container, or after the server has ended, the path may be anything: found without opening it.
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        same = f"/proc/self/fd/{found}"
        if not _NAME.fullmatch(name) or str(Path(same).readlink()) != f"/memfd:{name} (deleted)":
            raise NoSharedMemoryError(f"{path} is not the server's memory")
        return os.open(same, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(found)
