"""Tests of whom a server offers shared memory: callers on its machine, on systems that have memfds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import cast

import grpc.aio
import pytest

from kvcore.config import parse
from kvcore.wire import shared_memory
from kvcore.wire.shared_memory import MIN_SHARED_BYTES
from protos import kv_cache_pb2 as pb
from student_trainer.kv_sources.shared_memory import MemoryOfEndpoint
from teacher_server.config import ServeConfig
from teacher_server.monitoring.activity import Call
from teacher_server.requests.service import TeacherKVService
from teacher_server.requests.shared_frames import OPEN_SECONDS, SharedFrames
from teacher_server.state import ServerState


def offered(frames: SharedFrames, peer: str) -> pb.OpenMemoryResponse:
    return asyncio.run(frames.offer(peer))


@pytest.mark.parametrize("peer", ["ipv4:192.0.2.1:41234", "ipv6:%5B2001:db8::1%5D:41234", "ipv4:localhost:1", ""])
def test_callers_on_other_machines_get_no_memory(peer: str) -> None:
    frames = SharedFrames(total_bytes=5000, client_bytes=2000, frame_bytes=900)
    assert offered(frames, peer).problem == "the caller is not on the server's machine"
    assert frames.nbytes == 0


def test_the_service_knows_where_its_caller_is() -> None:
    state = ServerState(parse({"model": "fake:layers=2", "engine": "fake"}, ServeConfig))
    service = TeacherKVService(state)

    async def call(peer: str) -> pb.OpenMemoryResponse:
        with state.activity.during(Call("OpenMemory", peer)):
            return await service.open_memory(cast("grpc.aio.ServicerContext", None))

    with closing(service):
        assert "not on the server's machine" in asyncio.run(call("ipv4:192.0.2.1:41234")).problem
        assert asyncio.run(call("ipv4:127.0.0.1:41234")).name


def test_callers_with_any_address_of_this_machine_get_memory() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        # Sends nothing: it finds the address that this machine has in its network, or 127.0.0.1 without one.
        with contextlib.suppress(OSError):
            route.connect(("192.0.2.1", 1))
        own = route.getsockname()[0]
    peers = [f"ipv4:{own}:41234", "ipv4:127.0.1.1:1", "unix:", "unix-abstract:name"]
    if Path("/proc/net/if_inet6").exists() and Path("/proc/net/if_inet6").read_text(encoding="utf-8"):
        peers.append("ipv6:%5B::1%5D:41234")
    frames = SharedFrames(total_bytes=10**6, client_bytes=2000, frame_bytes=900)
    assert [offered(frames, peer).problem for peer in peers] == [""] * len(peers)
    frames.close()


def test_memory_of_a_call_that_was_cancelled_is_counted_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, begun, go_on = [100.0], threading.Event(), threading.Event()
    allocate = os.posix_fallocate

    def slowly(fd: int, offset: int, size: int) -> None:
        begun.set()
        assert go_on.wait(60)
        allocate(fd, offset, size)

    async def cancelled_call(frames: SharedFrames) -> None:
        call = asyncio.create_task(frames.offer("unix:"))
        await asyncio.to_thread(begun.wait, 60)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert frames.nbytes == 1000
        go_on.set()

    async def scenario(frames: SharedFrames) -> None:
        await cancelled_call(frames)
        assert (await frames.offer("unix:")).problem.startswith("no shared memory is left")
        await asyncio.gather(*frames._making)
        seconds[0] += OPEN_SECONDS
        frames.drop_unused()

    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(shared_memory.os, "posix_fallocate", slowly)
    frames = SharedFrames(total_bytes=1000, client_bytes=1000, frame_bytes=1000, now=lambda: seconds[0])
    asyncio.run(asyncio.wait_for(scenario(frames), 120))
    assert frames.nbytes == 0
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


WITHOUT_LINUX = """
import fcntl, os

for name in [name for name in dir(fcntl) if "SEAL" in name]:
    delattr(fcntl, name)
for name in [name for name in dir(os) if name.startswith(("memfd", "MFD_", "posix_fallocate"))]:
    delattr(os, name)

from kvcore.wire import shared_memory

assert not shared_memory.supported()
"""


def test_the_module_can_be_imported_where_there_are_no_memfds() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_LINUX], check=True, timeout=120)


def test_a_system_without_memfds_offers_no_memory_and_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert offered(SharedFrames(4000, 1000, 1000), "unix:").problem == "the server's system has no memfd"
    memory = MemoryOfEndpoint("ada", "127.0.0.1:1")
    memory.note_frame(MIN_SHARED_BYTES)
    assert memory.for_request(lambda: pytest.fail("the server was asked")) is None
