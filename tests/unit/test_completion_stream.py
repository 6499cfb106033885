"""Tests of the stream of generated completions: spans, text records and invalid streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvcore.errors import ProtocolError
from kvcore.plan import SamplingParams
from kvcore.types import EncodedSampleKV, Sample, Span
from kvcore.wire.completion import Completion, completed_sample
from kvcore.wire.frames import FrameWriter
from kvcore.wire.stream_reader import CompletionReader, RefusedSample, StreamReader
from tests.support.streams import INFO, PLAN, REQUEST, Forged, forge, sample_kv, write_layer, write_sample

SAMPLING = SamplingParams(max_new_tokens=40, answer_marker="####")
PROMPTS = (Sample("s0", text="Größe 🙂?"), Sample("s1", text="Q: 1+1? A:", spans=(Span("prompt", 3, 10),)))
KEYS = [prompt.key(INFO.weights_digest, PLAN, SAMPLING) for prompt in PROMPTS]
TEXTS = (" 思考 naïve. #### 7", " two")


def completion_of(index: int) -> Completion:
    sample = completed_sample(PROMPTS[index], TEXTS[index], SAMPLING.answer_marker)
    return Completion(sample, "stop" if index else "length", 5 + index, 0.5, 2.0)


def frames_of(max_body: int = 1 << 20) -> list[bytes]:
    """The frames of both samples. The text of the second follows the K/V of the first."""
    sent = [replace(sample_kv(index), sample_id=prompt.id) for index, prompt in enumerate(PROMPTS)]
    writer = FrameWriter(REQUEST, PLAN, KEYS, max_body)
    frames: list[bytes] = []
    for index, prompt in enumerate(PROMPTS):
        frames += writer.completion(index, prompt, completion_of(index)) + writer.flush()
        frames += write_sample(writer, index, sent[index])
        for at in range(len(PLAN.layers)):
            frames += write_layer(writer, [index], at, sent)
        frames += writer.sample_end(index, sent[index].timings)
    return frames + writer.end()


def read(frames: list[bytes]) -> tuple[CompletionReader, dict[int, EncodedSampleKV | RefusedSample]]:
    reader = CompletionReader(REQUEST, PLAN, PROMPTS, INFO, SAMPLING)
    results = dict(result for frame in frames for result in reader.feed(frame))
    reader.finish()
    return reader, results


@pytest.mark.parametrize(
    ("text", "marker", "expected"),
    [
        (" so 4. #### 4", "####", [("prompt", "Q?"), ("reasoning", " so 4. ####"), ("answer", " 4")]),
        ("a #### b #### c", "####", [("prompt", "Q?"), ("reasoning", "a ####"), ("answer", " b #### c")]),
        (" so 4.", "####", [("prompt", "Q?"), ("reasoning", " so 4.")]),
        (" so #### 4", "", [("prompt", "Q?"), ("reasoning", " so #### 4")]),
        (" so 4. ####", "####", [("prompt", "Q?"), ("reasoning", " so 4. ####")]),
        ("", "####", [("prompt", "Q?")]),
    ],
)
def test_answer_marker_separates_reasoning_and_answer(text: str, marker: str, expected: list[tuple[str, str]]) -> None:
    sample = completed_sample(Sample("x", text="Q?"), text, marker)
    assert sample.text is not None
    assert sample.text == "Q?" + text
    assert [(span.kind, sample.text[span.start : span.end]) for span in sample.spans] == expected


def test_spans_of_the_prompt_are_kept() -> None:
    sample = completed_sample(PROMPTS[1], " two", "")
    assert sample.spans == (Span("prompt", 3, 10), Span("reasoning", 10, 14))


@pytest.mark.parametrize("max_body", [1 << 20, 7, 1])
def test_texts_and_kv_round_trip_through_frames_of_any_size(max_body: int) -> None:
    reader, results = read(frames_of(max_body))
    assert reader.completions == {0: completion_of(0), 1: completion_of(1)}
    for index, outcome in results.items():
        assert isinstance(outcome, EncodedSampleKV)
        # The content key equals the key that StreamKV computes for the same text and spans.
        assert outcome.key == completion_of(index).sample.key(INFO.weights_digest, PLAN)


def test_sample_can_fail_after_its_text() -> None:
    writer = FrameWriter(REQUEST, PLAN, KEYS, 1 << 20)
    frames = writer.completion(0, PROMPTS[0], completion_of(0)) + writer.sample_failed(
        0, "FAILED_PRECONDITION", "no answer"
    )
    frames += writer.sample_failed(1, "INVALID_ARGUMENT", "too long") + writer.end()
    reader, results = read(frames)
    assert results == {
        0: RefusedSample("FAILED_PRECONDITION", "no answer"),
        1: RefusedSample("INVALID_ARGUMENT", "too long"),
    }
    assert reader.completions == {0: completion_of(0)}


def change(**values: object) -> Callable[[list[Forged]], object]:
    return lambda frames: frames[0].record("written").update(values)


def drop_text(frames: list[Forged]) -> None:
    del frames[0]


def repeat_text(frames: list[Forged]) -> None:
    frames[1].header["records"].insert(0, frames[0].record("written"))
    frames[1].body[:0] = frames[0].body


def move_text_after_kv(frames: list[Forged]) -> None:
    records: list[dict[str, Any]] = frames[1].header["records"]
    sample = records.pop(0)
    records[:0] = [sample | {"index": 1, "id": "s1", "key": KEYS[1]}, sample]


def break_utf8(frames: list[Forged]) -> None:
    frames[0].body[1] = 0xFF


INVALID_STREAMS: dict[str, tuple[Callable[[list[Forged]], object], str]] = {
    "spans that the marker does not give": (
        change(spans=[["prompt", 0, 8], ["reasoning", 8, 26]]),
        "has the spans",
    ),
    "spans beyond the text": (change(spans=[["reasoning", 8, 99]]), "has the spans"),
    "another sample's id": (change(id="s1"), "expected 's0'"),
    "another request's key": (change(key=KEYS[1]), "sample 's0': the teacher answered another request"),
    "K/V of another request": (
        lambda frames: frames[1].record("sample").update(key=KEYS[1]),
        "sample 's0': the teacher answered another request",
    ),
    "a sample that was not asked for": (change(index=2), "the request has 2"),
    "more tokens than were allowed": (change(tokens=41), "'tokens' must be a whole number between 0 and 40"),
    "a reason that there is not": (change(finish_reason="bored"), "'bored'"),
    "no seconds": (change(timings=None), "has no timings"),
    "negative seconds": (change(timings={"queue": -1, "write": 1}), "'queue' must hold finite numbers"),
    "a text of a terabyte": (change(index=0, size=1 << 40), "between"),
    "a text that is not UTF-8": (break_utf8, "not UTF-8"),
    "K/V without a text": (drop_text, "was opened before its text"),
    "a text twice": (repeat_text, "has two texts"),
    "K/V before the text": (move_text_after_kv, "was opened before its text"),
}


@pytest.mark.parametrize("case", INVALID_STREAMS)
def test_reader_refuses_invalid_streams(case: str) -> None:
    change_frames, problem = INVALID_STREAMS[case]
    with pytest.raises(ProtocolError, match=problem):
        read(forge(frames_of(), change_frames))


def test_other_streams_refuse_texts() -> None:
    reader = StreamReader(REQUEST, PLAN, PROMPTS, INFO)
    with pytest.raises(ProtocolError, match="unknown record kind 'written'"):
        reader.feed(frames_of()[0])
