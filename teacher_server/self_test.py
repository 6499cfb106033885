"""A short text through tokenizer, model, plan, codec and frames: what stands between loading and serving."""

from __future__ import annotations

from kvcore.errors import KVDistillError
from kvcore.plan import KVPlan, Selection
from kvcore.types import Sample, Span, TeacherInfo
from kvcore.wire.stream_reader import RefusedSample, StreamReader
from teacher_server.query import KVQuery
from teacher_server.sample_queue import BusyError
from teacher_server.service import TeacherKVService

PROMPT, REASONING, ANSWER = "1 + 2 = 3, 4 + 5 = 9. ", "7 + 8 = 15, 2 + 6 = 8. ", "9 + 1 = 10, 3 + 3 = 6."


class SelfTestError(KVDistillError):
    """The teacher did not answer its own server's question."""


async def self_test(service: TeacherKVService, info: TeacherInfo) -> None:
    """Asks for every layer of one sample, with importance, and reads the answer as a student would.

    Raises:
        SelfTestError: the sample failed, or the answer cannot be read.
        BusyError: the queue is full.
    """
    middle, last = len(PROMPT), len(PROMPT) + len(REASONING)
    spans = (Span("prompt", 0, middle), Span("reasoning", middle, last), Span("answer", last, last + len(ANSWER)))
    sample = Sample("self-test", text=PROMPT + REASONING + ANSWER, spans=spans)
    plan = KVPlan(layers=tuple(range(info.layers)), selection=Selection(selector="r_kv", budget=4))
    reader = StreamReader("self-test", plan, [sample], info)
    outcomes: list[object] = []

    async def write(frame: bytes) -> None:
        outcomes.extend(outcome for _, outcome in reader.feed(frame))

    try:
        await service.answer(KVQuery("self-test", plan, [sample]), write)
        reader.finish()
    except BusyError:
        raise
    except KVDistillError as error:
        raise SelfTestError(f"the self-test failed: {error}") from error
    for outcome in outcomes:
        if isinstance(outcome, RefusedSample):
            raise SelfTestError(f"the self-test failed: {outcome.message}")
