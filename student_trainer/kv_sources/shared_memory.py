"""The memory that a client shares with a teacher server on its machine, for the bodies of large frames."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import grpc

from kvcore.errors import FieldError
from kvcore.printable import printable
from kvcore.wire.shared_memory import MIN_SHARED_BYTES, NoSharedMemoryError, OpenedSlots, supported
from protos import kv_cache_pb2 as pb
from student_trainer.kv_sources.channel import without_address
from student_trainer.kv_sources.proxies import host_of, is_loopback
from student_trainer.launching.transport_variables import SHARED_MEMORY

logger = logging.getLogger(__name__)

# A server that had no memory left, or was started again, is not asked more often than this.
ASK_AGAIN_SECONDS = 300.0

Ask = Callable[[], pb.OpenMemoryResponse]


class MemoryOfEndpoint:
    """Opens the memory once large frames have come through the network. Whatever fails, K/V come that way.

    Args:
        teacher: the teacher's name in the configuration.
        endpoint: host:port.

    Raises:
        FieldError: the environment variable `KVDISTILL_SHARED_MEMORY` is neither 0 nor 1.
    """

    def __init__(self, teacher: str, endpoint: str) -> None:
        self._teacher, self._endpoint = teacher, endpoint
        on_this_machine = is_loopback(endpoint) or host_of(endpoint) == socket.gethostname()
        self._ask_at = -math.inf if _allowed() and on_this_machine and supported() else math.inf
        self._wanted = False
        self._opened: OpenedSlots | None = None
        self._last_problem = ""

    def for_request(self, ask: Ask) -> OpenedSlots | None:
        """The memory for a new request, all of it free; None if the request takes the network alone.

        Args:
            ask: calls `OpenMemory`.

        Raises:
            concurrent.futures.CancelledError: `ask` was cancelled. The next request asks again.
        """
        if self._opened is None and self._wanted and time.monotonic() >= self._ask_at:
            self._open(ask)
            self._ask_at = time.monotonic() + ASK_AGAIN_SECONDS
        opened = self._opened
        if opened is not None:
            opened.release_all()
        return opened

    def note_frame(self, nbytes: int) -> None:
        """A frame of this size has come through the network."""
        self._wanted |= nbytes >= MIN_SHARED_BYTES

    def forget(self) -> None:
        """The server does not know the memory: it was started again, or is another one."""
        self._opened, self._wanted = None, False

    def close(self) -> None:
        """Ends the use of memory. It is freed when a request in progress has ended."""
        self._opened, self._ask_at = None, math.inf

    def _open(self, ask: Ask) -> None:
        try:
            self._opened = _opened(ask)
        except NoSharedMemoryError as error:
            problem = str(error)
            if problem != self._last_problem:
                self._last_problem = problem
                message = "teacher '%s': K/V of %s come through the network, not through shared memory: %s"
                logger.info(message, self._teacher, self._endpoint, problem)
        else:
            message = "teacher '%s': large frames of %s come through %d bytes of shared memory"
            logger.info(message, self._teacher, self._endpoint, self._opened.nbytes)


def _opened(ask: Ask) -> OpenedSlots:
    try:
        offer = ask()
    except grpc.RpcError as error:
        call: Any = error
        problem = f"{call.code().name}: {without_address(printable(call.details() or 'no details'))}"
        raise NoSharedMemoryError(problem) from error
    except ValueError as error:
        # The channel was closed.
        raise NoSharedMemoryError(str(error)) from error
    if offer.problem:
        raise NoSharedMemoryError(printable(offer.problem))
    return OpenedSlots(offer)


def _allowed() -> bool:
    value = os.environ.get(SHARED_MEMORY) or "1"
    if value not in ("0", "1"):
        raise FieldError(SHARED_MEMORY, f"must be 0 or 1 (got '{value}')")
    return value == "1"
