"""The maps that a server holds: their number, bytes and age are limited, and a map that is sent is checked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from kvcore.errors import FieldError
from kvcore.plan import KVPlan
from kvcore.tensors.kv_map import KVMap
from protos import kv_cache_pb2 as pb
from teacher_server.requests.map_store import KEPT_SECONDS, MAX_MAPS, MapStore, UnknownMapError, receive_map
from teacher_server.sample_queue import BusyError
from tests.support.kv_fakes import INFO
from tests.support.kv_maps import random_map

FEATURES = INFO.kv_heads * INFO.head_dim
MAPS = [random_map((0, 2), FEATURES, seed=seed) for seed in range(4)]
SIZE = MAPS[0].nbytes


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def plan_of(kv_map: KVMap) -> KVPlan:
    return KVPlan(layers=kv_map.layers, map=kv_map.named)


def keep(store: MapStore, *maps: KVMap) -> None:
    for kv_map in maps:
        store.add(kv_map.named.digest, kv_map)


def held(store: MapStore) -> list[int]:
    return [number for number, kv_map in enumerate(MAPS) if kv_map.named.digest in store]


def test_a_plan_finds_its_map_and_an_unknown_one_is_asked_for() -> None:
    store = MapStore(10 * SIZE)
    keep(store, MAPS[0])
    assert store.named_by(plan_of(MAPS[0])) is MAPS[0]
    assert store.named_by(KVPlan(layers=(0, 2))) is None
    with pytest.raises(UnknownMapError, match=f"^plan.map: this server does not hold the map {MAPS[1].named.digest}"):
        store.named_by(plan_of(MAPS[1]))
    with pytest.raises(FieldError, match=r"^plan.layers"):
        store.named_by(plan_of(MAPS[0]).model_copy(update={"layers": (0, 1)}))


def test_the_map_that_was_not_named_for_longest_makes_room() -> None:
    store = MapStore(3 * SIZE)
    keep(store, *MAPS[:3])
    store.named_by(plan_of(MAPS[0]))
    keep(store, MAPS[3])
    assert held(store) == [0, 2, 3]


def test_the_number_of_maps_is_limited() -> None:
    store = MapStore(10**9)
    for number in range(MAX_MAPS):
        store.add(f"{number:032x}", MAPS[0])
    keep(store, MAPS[1])
    assert f"{0:032x}" not in store
    assert f"{1:032x}" in store
    assert held(store) == [1]


def test_a_map_that_is_not_named_is_dropped_in_the_end() -> None:
    clock = Clock()
    store = MapStore(10 * SIZE, clock)
    keep(store, MAPS[0], MAPS[1])
    clock.seconds = KEPT_SECONDS - 1
    store.named_by(plan_of(MAPS[1]))
    clock.seconds = KEPT_SECONDS + 1
    store.drop_unused()
    assert held(store) == [1]


# ---------------------------------------------------------------------------------------------------- receiving


def sent(kv_map: KVMap, pieces: int = 3, **first: object) -> list[bytes]:
    """The messages of a call; `first` changes the first one."""
    content = kv_map.content()
    step = -(-len(content) // pieces)
    head = {"digest": kv_map.named.digest, "size": len(content), **first}
    parts = [pb.LoadMapRequest(data=content[at : at + step]) for at in range(0, len(content), step)]
    return [message.SerializeToString() for message in (pb.LoadMapRequest(**head), *parts)]


def receive(store: MapStore, messages: Sequence[bytes]) -> int:
    """Receive messages; returns how many were left unread."""
    left = list(messages)

    async def next_message() -> bytes | None:
        return left.pop(0) if left else None

    asyncio.run(receive_map(next_message, store, INFO))
    return len(left)


def test_a_map_is_received_in_pieces_and_only_once() -> None:
    store = MapStore(10 * SIZE)
    assert receive(store, sent(MAPS[0])) == 0
    found = store.named_by(plan_of(MAPS[0]))
    assert found is not None
    assert found.named == MAPS[0].named
    assert receive(store, sent(MAPS[0])) == 3, "a map that is here is not read again"
    first = pb.LoadMapRequest.FromString(sent(MAPS[1])[0])
    first.data = MAPS[1].content()
    assert receive(store, [first.SerializeToString()]) == 0, "the first message may hold all of it"
    assert held(store) == [0, 1]


CONTENT = len(MAPS[0].content())


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], r"^digest: must be 32 hexadecimal digits in the first message; got ''"),
        ([b"\xff"], r"^request: is not a valid LoadMapRequest"),
        (sent(MAPS[0], digest="../etc"), r"^digest: must be 32 hexadecimal digits"),
        (sent(MAPS[0], digest="0" * 32), rf"^digest: got {'0' * 32}; the digest of the data is {MAPS[0].named.digest}"),
        (sent(MAPS[0], size=0), r"^size: must be 1 to \d+ bytes \(max_map_bytes\); got 0"),
        (sent(MAPS[0], size=10**12), r"^size: must be 1 to \d+ bytes \(max_map_bytes\); got 1000000000000"),
        (sent(MAPS[0])[:-1], rf"^data: has \d+ bytes; the first message announced {CONTENT}"),
        (sent(MAPS[0], size=CONTENT - 1), rf"^data: has {CONTENT} bytes; the first message announced {CONTENT - 1}"),
        (sent(random_map((0, 5), FEATURES)), r"^map.layers: has layer 5"),
        (sent(random_map((0, 2), FEATURES + 1)), r"^map.k.centre: has 33 features; this teacher has 32"),
    ],
)
def test_a_map_that_is_damaged_or_too_large_is_refused(messages: list[bytes], problem: str) -> None:
    store = MapStore(10 * SIZE)
    with pytest.raises(FieldError, match=problem):
        receive(store, messages)
    assert held(store) == []
    with store.receiving(10 * SIZE):
        pass  # No memory stays reserved.


def test_a_map_that_is_too_large_is_refused_before_its_data_is_read() -> None:
    left = sent(MAPS[0])

    async def next_message() -> bytes | None:
        return left.pop(0)

    with pytest.raises(FieldError, match="max_map_bytes"):
        asyncio.run(receive_map(next_message, MapStore(SIZE // 2), INFO))
    assert len(left) == 3


def test_maps_that_are_received_at_the_same_time_share_the_memory() -> None:
    store = MapStore(2 * CONTENT)
    with store.receiving(CONTENT + 1), pytest.raises(BusyError, match="are being received"):
        receive(store, sent(MAPS[0]))
    assert receive(store, sent(MAPS[0])) == 0
