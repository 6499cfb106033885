"""The server's self-test before it serves: short texts alone and in a batch, then through all of the server."""

from __future__ import annotations

from kvcore.errors import KVDistillError
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import Sample, Span, TeacherInfo, Tensor
from kvcore.wire.stream_reader import RefusedSample, StreamReader
from teacher_server.engines.base import LayerResult, PlannedSample, SampleFailure, TeacherEngine, TokenizedSample
from teacher_server.engines.batch_check import check_same, short_and_long
from teacher_server.fair_share import THE_SERVER
from teacher_server.requests.request_parsing import KVQuery
from teacher_server.requests.service import TeacherKVService
from teacher_server.sample_queue import BusyError, SampleQueue

PROMPT, REASONING, ANSWER = "1 + 2 = 3, 4 + 5 = 9. ", "7 + 8 = 15, 2 + 6 = 8. ", "9 + 1 = 10, 3 + 3 = 6."


class SelfTestError(KVDistillError):
    """The teacher failed its self-test."""


def batch_test(engine: TeacherEngine) -> None:
    """Read a short text alone and beside a longer one, and compare its keys and values. Call it before others use it.

    Raises:
        SelfTestError: the engine failed on a text.
        UnsupportedModelError: keys or values differ.
    """
    short, long = short_and_long(engine)
    alone, beside = _first_kv(engine, [short]), _first_kv(engine, [short, long])
    check_same(engine.info, alone, beside, "right")


def _first_kv(engine: TeacherEngine, batch: list[TokenizedSample]) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of the first text of a batch, by layer."""
    layers = tuple(range(engine.info.layers))
    plan = KVPlan(layers=layers, selection=Selection(selector="full", span="all"), codec=CodecSpec(name="raw"))
    results: list[LayerResult] = []
    failures: list[SampleFailure] = []
    engine.run([PlannedSample(tokens, plan) for tokens in batch], results.append, failures.append, lambda _row: True)
    if failures:
        raise SelfTestError(f"the self-test failed: {failures[0].problem}")
    first = [result.only([0]) for result in results if 0 in result.indices]
    return {result.layer: (result.parts["k.data"][0], result.parts["v.data"][0]) for result in first}


async def self_test(service: TeacherKVService, queue: SampleQueue, info: TeacherInfo) -> None:
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
        with queue.reserve(THE_SERVER, len(sample.text or ""), len(sample.text or "")) as reserved:
            await service.answer(KVQuery("self-test", plan, [sample]), reserved, read)
        reader.finish()
    except BusyError:
        raise
    except KVDistillError as error:
        raise SelfTestError(f"the self-test failed: {error}") from error
    for outcome in outcomes:
        if isinstance(outcome, RefusedSample):
            raise SelfTestError(f"the self-test failed: {outcome.message}")
