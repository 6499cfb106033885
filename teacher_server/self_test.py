"""The server's self-test: sends a short text through tokenizer, model, plan, codec and frames before it serves."""

from __future__ import annotations

from kvcore.errors import KVDistillError
from kvcore.plan import KVPlan, Selection
from kvcore.types import Sample, Span, TeacherInfo
from kvcore.wire.stream_reader import RefusedSample, StreamReader
from teacher_server.requests.request_parsing import KVQuery
from teacher_server.requests.service import TeacherKVService
from teacher_server.sample_queue import BusyError

PROMPT, REASONING, ANSWER = "1 + 2 = 3, 4 + 5 = 9. ", "7 + 8 = 15, 2 + 6 = 8. ", "9 + 1 = 10, 3 + 3 = 6."


class SelfTestError(KVDistillError):
    """The teacher failed its self-test."""


async def self_test(service: TeacherKVService, info: TeacherInfo) -> None:
    """Request every layer of one sample, with importance, and read the answer as a trainer would.

    Raises:
        SelfTestError: the sample failed, or the answer is not valid.
        BusyError: the queue is full.
    """
    middle, last = len(PROMPT), len(PROMPT) + len(REASONING)
    spans = (Span("prompt", 0, middle), Span("reasoning", middle, last), Span("answer", last, last + len(ANSWER)))
    sample = Sample("self-test", text=PROMPT + REASONING + ANSWER, spans=spans)
    plan = KVPlan(layers=tuple(range(info.layers)), selection=Selection(selector="r_kv", budget=4))
    reader = StreamReader("self-test", plan, [sample], info)
    outcomes: list[object] = []

    async def read(frame: bytes) -> None:
        outcomes.extend(outcome for _, outcome in reader.feed(frame))

    try:
        await service.answer(KVQuery("self-test", plan, [sample]), read)
        reader.finish()
    except BusyError:
        raise
    except KVDistillError as error:
        raise SelfTestError(f"the self-test failed: {error}") from error
    for outcome in outcomes:
        if isinstance(outcome, RefusedSample):
            raise SelfTestError(f"the self-test failed: {outcome.message}")
