"""One thread for work that grows with requests: parsing and tokenizing. Requests take turns by bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from teacher_server.fair_share import Caller, FairShare, Path

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class _Work:
    """Work that waits. `turn`: done when it may start."""

    nbytes: int
    turn: asyncio.Future[None]


class WorkThread:
    """Runs one function at a time. Used on the event loop's thread only.

    There is one thread because tokenizers release the interpreter lock for long texts, but not all are thread-safe.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._share = FairShare()
        self._waiting: dict[Path, _Work] = {}
        self._busy = False

    async def run(
        self, caller: Caller, request: int, nbytes: int, function: Callable[..., ResultT], *arguments: object
    ) -> ResultT:
        """Call a function in the thread when it is this request's turn.

        Args:
            caller, request: on whose behalf. A request has one work at a time.
            nbytes: what the work counts for; about as long as the work takes.
            function, arguments: the work. Long work should come in parts, so that other requests can go between.
        """
        loop = asyncio.get_running_loop()
        path, work = (*caller, request), _Work(nbytes, loop.create_future())
        assert path not in self._waiting
        self._waiting[path] = work
        self._start_next()
        try:
            await work.turn
        except asyncio.CancelledError:
            self._leave(path, work)
            raise
        self._share.charge(path, nbytes)
        done: Future[Any] = self._pool.submit(function, *arguments)
        # The turn ends with the work, even if the caller no longer waits for it.
        done.add_done_callback(lambda _done: loop.call_soon_threadsafe(self._end_turn))
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """End the thread; waiting work is discarded."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _leave(self, path: Path, work: _Work) -> None:
        if self._waiting.get(path) is work:
            del self._waiting[path]
        elif not work.turn.cancelled():
            self._end_turn()  # its turn had come, but the caller left before the work began

    def _end_turn(self) -> None:
        self._busy = False
        self._start_next()

    def _start_next(self) -> None:
        if self._busy or not self._waiting:
            return
        path = self._share.next({path: work.nbytes for path, work in self._waiting.items()})
        work = self._waiting.pop(path)
        self._busy = True
        if work.turn.cancelled():
            self._end_turn()
        else:
            work.turn.set_result(None)
