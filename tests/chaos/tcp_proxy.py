"""A TCP proxy that holds, delays, damages or cuts what passes through it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from enum import StrEnum
from typing import Self

_CHUNK_BYTES = 1 << 16
_SLOW_SECONDS = 0.3
_FLIPPED_SHARE = 0.05


class Mode(StrEnum):
    """What the proxy does to bytes, in both directions."""

    PASS = "pass"
    HOLD = "hold"
    SLOW = "slow"
    FLIP = "flip"


class TcpProxy:
    """Forwards connections to a local port. `mode` may change at any time; `flips` counts flipped bits.

    Args:
        target_port: of the server on 127.0.0.1.
        seed: of the choice of bits.
    """

    def __init__(self, target_port: int, seed: int) -> None:
        self.mode = Mode.PASS
        self.flips = 0
        self.port = 0
        self._target_port = target_port
        self._random = random.Random(seed)
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Reset every open connection."""
        self._loop.call_soon_threadsafe(self._abort_all)

    def _abort_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _close(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._abort_all()

    async def _listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        both = (writer, onward_writer)
        self._writers.update(both)
        both_ways = (self._forward(reader, onward_writer), self._forward(onward_reader, writer))
        tasks = [asyncio.create_task(one_way) for one_way in both_ways]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for each in both:
            each.transport.abort()
        self._writers.difference_update(both)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                while self.mode is Mode.HOLD:  # noqa: ASYNC110  (another thread changes it)
                    await asyncio.sleep(0.05)
                if self.mode is Mode.SLOW:
                    await asyncio.sleep(_SLOW_SECONDS)
                writer.write(self._damaged(data) if self.mode is Mode.FLIP else data)
                await writer.drain()

    def _damaged(self, data: bytes) -> bytes:
        if self._random.random() >= _FLIPPED_SHARE:
            return data
        self.flips += 1
        damaged, bit = bytearray(data), self._random.randrange(8 * len(data))
        damaged[bit // 8] ^= 1 << bit % 8
        return bytes(damaged)
