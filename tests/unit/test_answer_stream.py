"""Tests that an answer stream ends once, after its last sample."""

from __future__ import annotations

import asyncio

from kvcore.wire.frames import FrameWriter, unpack_frame
from teacher_server.requests.answer_stream import AnswerStream
from tests.support.streams import PLAN, REQUEST


def test_stream_ends_once_if_batch_ends_after_last_sample() -> None:
    """Samples can fail before their batch ends."""

    async def kinds() -> list[str]:
        stream = AnswerStream(FrameWriter(REQUEST, PLAN, ["a", "b"], 1 << 20), 2, lambda _status: None)
        stream.refuse(0, "FAILED_PRECONDITION", "not finite")
        stream.refuse(1, "FAILED_PRECONDITION", "no answer")
        stream.settle()
        stream.on_batch_end([], [], 100)
        found: list[str] = []
        while (outgoing := await stream.next()) is not None:
            found += [record["kind"] for record in unpack_frame(outgoing.frame)[0]["records"]]
        return found

    assert asyncio.run(kinds()) == ["sample_end", "sample_end", "end"]
