"""Tests of the memory that a server shares with a client: slots, leases, and what a client refuses to open."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

import pytest
import xxhash

from kvcore.config import parse
from kvcore.errors import FieldError, ProtocolError
from kvcore.wire import shared_memory
from kvcore.wire.frames import body_of, pack_frame, unpack_frame, with_shared_body
from kvcore.wire.shared_memory import (
    LEASE_SECONDS,
    MIN_SHARED_BYTES,
    Layout,
    NoSharedMemoryError,
    OpenedSlots,
    SharedSlots,
)
from protos import kv_cache_pb2 as pb
from teacher_server.config import ServeConfig
from teacher_server.requests.shared_frames import OPEN_SECONDS, SharedFrames, with_body_in

LAYOUT = Layout(slots=3, slot_bytes=1000)


class Clock:
    """Seconds that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def body_number(number: int, size: int = 1000) -> memoryview:
    return memoryview(bytes((number + at) % 251 for at in range(size)))


def put(slots: SharedSlots, number: int) -> pb.SharedBody:
    place = slots.put(body_number(number))
    assert place is not None
    return place


def test_bodies_are_read_as_they_were_put_and_their_slots_are_used_again() -> None:
    slots = SharedSlots(LAYOUT)
    client = OpenedSlots(slots.offer())
    assert client.key == slots.key
    for number in range(20):
        sizes = (1, 999, 1000)
        places = [slots.put(body_number(number, size)) for size in sizes]
        # In another order than they were put.
        for place, size in reversed(list(zip(places, sizes, strict=True))):
            assert place is not None
            assert client.read(place) == body_number(number, size)
    slots.close()


def test_a_body_that_finds_no_slot_is_not_put() -> None:
    slots = SharedSlots(LAYOUT)
    client = OpenedSlots(slots.offer())
    places = [put(slots, number) for number in range(3)]
    assert slots.put(body_number(3)) is None
    client.read(places[1])
    assert slots.put(body_number(4, 1001)) is None
    assert put(slots, 5).slot == 1
    assert slots.put(body_number(6)) is None
    assert [client.read(place) for place in (places[0], places[2])] == [body_number(0), body_number(2)]
    slots.close()


def test_after_the_lease_a_slot_gets_another_body_and_the_late_reader_notices() -> None:
    clock = Clock()
    slots = SharedSlots(LAYOUT, clock)
    client = OpenedSlots(slots.offer())
    late = [put(slots, number) for number in range(3)]
    clock.now += LEASE_SECONDS - 0.1
    assert slots.put(body_number(3)) is None
    clock.now += 0.2
    new = put(slots, 4)
    assert new.slot == late[0].slot
    with pytest.raises(ProtocolError, match="has another body: it was read too late"):
        client.read(late[0])
    # The late read did not free the slot of the new body.
    assert put(slots, 5).slot != new.slot
    assert client.read(new) == body_number(4)
    # Its lease has expired too, but its slot still has its body.
    assert client.read(late[2]) == body_number(2)
    slots.close()


def test_a_body_that_is_replaced_while_it_is_copied_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    slots = SharedSlots(LAYOUT, clock)
    client = OpenedSlots(slots.offer())
    place = put(slots, 0)
    view_of = Layout.slot

    def slow_slot(layout: Layout, memory: memoryview, number: int, size: int) -> memoryview:
        found = view_of(layout, memory, number, size)
        monkeypatch.setattr(Layout, "slot", view_of)
        clock.now += LEASE_SECONDS
        put(slots, 1)
        return found

    monkeypatch.setattr(Layout, "slot", slow_slot)
    with pytest.raises(ProtocolError, match="read too late"):
        client.read(place)
    slots.close()


def test_a_new_request_frees_what_the_last_one_did_not_read() -> None:
    slots = SharedSlots(LAYOUT)
    client = OpenedSlots(slots.offer())
    for number in range(3):
        put(slots, number)
    client.release_all()
    assert [put(slots, number).slot for number in range(3)] == [0, 1, 2]
    slots.close()


@pytest.mark.parametrize(
    ("slot", "size"), [(3, 10), (2**32 - 1, 10), (0, 0), (0, 1001), (2, 1001), (0, 2**32 - 1)], ids=str
)
def test_a_place_outside_of_the_memory_is_refused(slot: int, size: int) -> None:
    slots = SharedSlots(LAYOUT)
    client = OpenedSlots(slots.offer())
    put(slots, 0)
    with pytest.raises(ProtocolError, match=r"slot \d+ of the shared memory, which has 3 slots of 1000 bytes"):
        client.read(pb.SharedBody(slot=slot, generation=1, size=size))
    slots.close()


def changed(offer: pb.OpenMemoryResponse, **fields: object) -> pb.OpenMemoryResponse:
    other = pb.OpenMemoryResponse()
    other.CopyFrom(offer)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def test_what_is_not_the_servers_memory_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = SharedSlots(LAYOUT)
    offer = slots.offer()
    OpenedSlots(offer)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pipe = os.open(fifo, os.O_RDWR)
    growing = os.memfd_create(offer.name)
    os.truncate(growing, LAYOUT.nbytes)
    try:
        for fields in (
            {"pid": 2**31 - 1},
            {"fd": 2**31 - 1},
            {"fd": pipe},
            {"fd": growing},
            {"name": "../../etc/passwd"},
            {"name": "kvdistill-" + "0" * 32},
            {"slots": 4},
            {"slots": 0},
            {"slots": 2**31 - 1},
            {"slot_bytes": 999},
            {"slot_bytes": -1},
        ):
            with pytest.raises(NoSharedMemoryError):
                OpenedSlots(changed(offer, **fields))
        monkeypatch.setattr(shared_memory.os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(NoSharedMemoryError, match="is not this user's memory"):
            OpenedSlots(offer)
    finally:
        os.close(pipe)
        os.close(growing)
    slots.close()
    with pytest.raises(NoSharedMemoryError, match=r"/proc/\d+/fd/\d+"):
        OpenedSlots(offer)


def test_what_was_checked_is_what_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = SharedSlots(LAYOUT)
    offer = slots.offer()
    other, kept, open_file, seen = os.memfd_create("other"), os.dup(offer.fd), os.open, list[str]()

    def replaced_meanwhile(path: str, flags: int) -> int:
        if flags & os.O_RDWR:
            os.dup2(other, offer.fd)
        fd = open_file(path, flags)
        seen.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        return fd

    monkeypatch.setattr(shared_memory.os, "open", replaced_meanwhile)
    try:
        assert OpenedSlots(offer).key == slots.key
    finally:
        os.dup2(kept, offer.fd)
        os.close(other)
        os.close(kept)
    assert set(seen) == {f"/memfd:{offer.name} (deleted)"}
    slots.close()


def test_a_server_sees_whether_a_client_holds_the_memory() -> None:
    slots = SharedSlots(LAYOUT)
    assert not slots.is_open()
    client = OpenedSlots(slots.offer())
    assert slots.is_open()
    assert slots.is_open()
    del client
    gc.collect()
    assert not slots.is_open()
    slots.close()


def test_no_other_user_may_open_the_memory_and_no_one_may_resize_it() -> None:
    slots = SharedSlots(LAYOUT)
    path = Path(f"/proc/{os.getpid()}/fd/{slots.offer().fd}")
    assert path.stat().st_mode & 0o777 == 0o600
    for size in (0, 2 * LAYOUT.nbytes):
        with pytest.raises(PermissionError), path.open("r+b") as file:
            file.truncate(size)
    slots.close()


def test_large_bodies_go_into_slots_and_small_ones_stay_in_the_frame() -> None:
    slots = SharedSlots(Layout(2, 2 * MIN_SHARED_BYTES))
    client = OpenedSlots(slots.offer())
    for size, shared in ((MIN_SHARED_BYTES - 1, 0), (MIN_SHARED_BYTES, MIN_SHARED_BYTES)):
        body = os.urandom(size)
        header = {"xxh3": xxhash.xxh3_64_intdigest(body), "records": []}
        frame, shared_bytes = with_body_in(slots, pack_frame(header, body))
        assert shared_bytes == shared
        assert (len(frame) < 200) == (shared > 0)
        assert len(body_of(frame)) == size - shared
        assert unpack_frame(frame, client.read) == (header, body)
    slots.close()


def test_a_body_in_memory_that_was_not_agreed_is_refused() -> None:
    place = pb.SharedBody(slot=0, generation=1, size=5)
    frame = with_shared_body(pack_frame({"v": 1}, b""), place)
    with pytest.raises(ProtocolError, match="shared memory, which was not agreed"):
        unpack_frame(frame)
    both = pb.KVFrame.FromString(frame)
    both.body = b"body"
    with pytest.raises(ProtocolError, match="or two bodies"):
        unpack_frame(both.SerializeToString(), lambda _place: b"other")
    malformed = frame.replace(place.SerializeToString(), b"\xff" * place.ByteSize())
    with pytest.raises(ProtocolError, match="malformed"):
        unpack_frame(malformed, lambda _place: b"other")


def test_a_flipped_bit_in_a_frame_never_gives_another_body() -> None:
    slots = SharedSlots(Layout(4, MIN_SHARED_BYTES))
    client = OpenedSlots(slots.offer())
    # Every slot has a body of the same generation.
    answers = [large_frame(slots) for _ in range(4)]
    frame, header, body = answers[-1]
    noticed = 0
    for bit in range(8 * len(frame)):
        changed_frame = bytearray(frame)
        changed_frame[bit // 8] ^= 1 << bit % 8
        try:
            found_header, found = unpack_frame(bytes(changed_frame), client.read)
        except ProtocolError:
            noticed += 1
            continue
        # `StreamReader` compares these.
        if found_header["xxh3"] != xxhash.xxh3_64_intdigest(found):
            noticed += 1
        else:
            assert (found_header, found) == (header, body)
    assert noticed > 7 * len(frame)
    slots.close()


def large_frame(slots: SharedSlots) -> tuple[bytes, dict[str, object], bytes]:
    """A frame whose body is in a slot, its header and its body."""
    body = os.urandom(MIN_SHARED_BYTES)
    header: dict[str, object] = {"xxh3": xxhash.xxh3_64_intdigest(body), "records": []}
    frame, shared_bytes = with_body_in(slots, pack_frame(header, body))
    assert shared_bytes
    return frame, header, body


def offered(frames: SharedFrames) -> pb.OpenMemoryResponse:
    return asyncio.run(frames.offer("ipv4:127.0.0.1:41234"))


def test_all_clients_together_and_each_one_have_a_limit() -> None:
    frames = SharedFrames(total_bytes=5000, client_bytes=2000, frame_bytes=900, now=Clock())
    offers = [offered(frames), offered(frames)]
    assert [offer.slots for offer in offers] == [2, 2]
    assert frames.nbytes == 3600
    refused = offered(frames)
    assert refused.problem == (
        "no shared memory is left for 1800 bytes: 3600 of 5000 bytes are in use (shared_memory_bytes)"
    )
    assert not refused.name
    frames.close()
    assert frames.nbytes == 0
    assert offered(SharedFrames(0, 2000, 900)).problem == "the server shares no memory (shared_memory_bytes is 0)"


def test_memory_that_no_client_holds_is_freed_after_a_while() -> None:
    clock = Clock()
    frames = SharedFrames(total_bytes=4000, client_bytes=1000, frame_bytes=1000, now=clock)
    never_opened, opened = offered(frames), OpenedSlots(offered(frames))
    metadata = (("other", b"x"), ("kvdistill-memory", opened.key))
    clock.now += OPEN_SECONDS - 0.1
    frames.drop_unused()
    assert frames.nbytes == 2000
    named = OpenedSlots(offered(frames))
    assert frames.named_by((("kvdistill-memory", named.key),)) is not None
    frames.drop_unused()
    assert frames.nbytes == 3000
    del named
    gc.collect()
    frames.drop_unused()
    assert frames.nbytes == 2000
    clock.now += 0.2
    frames.drop_unused()
    assert frames.nbytes == 1000
    with pytest.raises(NoSharedMemoryError):
        OpenedSlots(never_opened)
    clock.now += 1000.0
    frames.drop_unused()
    assert frames.named_by(metadata) is not None
    assert frames.named_by((("kvdistill-memory", "0" * 64),)) is None
    assert frames.named_by(()) is None
    del opened
    gc.collect()
    frames.drop_unused()
    assert frames.nbytes == 0
    assert frames.named_by(metadata) is None


def test_a_system_without_room_shares_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(_fd: int, _offset: int, _size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_memory.os, "posix_fallocate", full)
    frames = SharedFrames(total_bytes=4000, client_bytes=1000, frame_bytes=1000)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with caplog.at_level("INFO"):
        for _ in range(3):
            assert offered(frames).problem == "the system has no 1000 bytes of shared memory: No space left on device"
    assert len(caplog.records) == 1
    assert frames.nbytes == 0
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"shared_client_bytes": 1 << 19},
            "shared_client_bytes: 524288 is smaller than a frame of up to 1048576 bytes",
        ),
        ({"shared_memory_bytes": 1 << 20}, "shared_memory_bytes: 1048576 is smaller than the memory of one client"),
        ({"shared_memory_bytes": -1}, "shared_memory_bytes: Input should be greater than or equal to 0"),
    ],
    ids=str,
)
def test_sizes_that_hold_no_frame_are_refused(settings: dict[str, int], problem: str) -> None:
    tree: dict[str, object] = {"model": "fake:layers=2", "engine": "fake"}
    with pytest.raises(FieldError, match=problem):
        parse(tree | settings, ServeConfig)
    # Without shared memory, the size of a client's does not matter.
    assert parse({**tree, "shared_memory_bytes": 0, "shared_client_bytes": 1}, ServeConfig).shared_client_bytes == 1
    # The largest frame fits into the defaults.
    assert parse({**tree, "max_frame_bytes": 64 << 20}, ServeConfig).shared_memory_bytes
