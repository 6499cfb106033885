"""Faults on purpose in a server's answers (`--chaos`), to rehearse what a run does when a teacher fails."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from teacher_server.chaos_spec import ChaosSpec
from teacher_server.monitoring.logs import log_event
from teacher_server.state import NotReadyError

log = logging.getLogger(__name__)

# A fault strikes at one of the first frames: small answers have few.
FIRST_FRAMES = 3

Send = Callable[[bytes], Awaitable[None]]


class RehearsedFaultError(NotReadyError):
    """The server ends an answer on purpose."""


class Chaos:
    """Makes some of a server's answers fail. Used on the event loop's thread only.

    Args:
        text: see `ChaosSpec.parse`.
    """

    def __init__(self, text: str) -> None:
        self._spec = ChaosSpec.parse(text)
        self._answers = 0
        log_event(log, "chaos", level=logging.WARNING, problem="this server makes faults on purpose", spec=text)

    @asynccontextmanager
    async def spoiled(self, send: Send) -> AsyncIterator[Send]:
        """The sender of one answer's frames, with the faults of this answer. The last frame is sent at the end.

        Raises:
            RehearsedFaultError: this answer is aborted.
        """
        self._answers += 1
        answer = _Answer(self._spec, self._answers, send)
        yield answer.send
        await answer.end()


class _Answer:
    """One answer. Its fault strikes at one of the first frames, or at the last one if there are fewer."""

    def __init__(self, spec: ChaosSpec, number: int, send: Send) -> None:
        self._number, self._delay, self._send = number, spec.delay, send
        self._draws = random.Random(f"{spec.seed}/{number}")
        self._fault = _fault(spec, self._draws.random())
        self._strikes_at = self._draws.randrange(FIRST_FRAMES)
        self._held: bytes | None = None
        self._frames = 0
        self._truncated = False

    async def send(self, frame: bytes) -> None:
        """Sends the frame before this one, which is thus known not to be the last one."""
        held, self._held = self._held, frame
        if held is not None:
            await self._pass_on(held, strike=self._frames == self._strikes_at)

    async def end(self) -> None:
        """Sends the last frame."""
        if self._held is not None:
            await self._pass_on(self._held, strike=self._frames <= self._strikes_at)

    async def _pass_on(self, frame: bytes, *, strike: bool) -> None:
        if self._frames == 0 and self._delay:
            await asyncio.sleep(self._delay)
        if strike and self._fault is not None:
            number, at = self._number, self._frames
            log_event(log, "chaos_fault", level=logging.WARNING, fault=self._fault, answer=number, frame=at)
            if self._fault == "abort":
                raise RehearsedFaultError(f"aborted on purpose: --chaos, answer {self._number}")
            if self._fault == "truncate":
                self._truncated = True
            else:
                frame = _flipped(frame, self._draws)
        self._frames += 1
        if not self._truncated:
            await self._send(frame)


def _fault(spec: ChaosSpec, drawn: float) -> str | None:
    """The fault of an answer, from a number between 0 and 1."""
    for name, part in (("abort", spec.abort), ("truncate", spec.truncate), ("flip", spec.flip)):
        if drawn < part:
            return name
        drawn -= part
    return None


def _flipped(frame: bytes, draws: random.Random) -> bytes:
    changed = bytearray(frame)
    changed[draws.randrange(len(changed))] ^= 1 << draws.randrange(8)
    return bytes(changed)
