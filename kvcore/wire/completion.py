"""What becomes of a prompt that a teacher wrote on from: an ordinary sample, alike on both sides."""

from __future__ import annotations

from dataclasses import dataclass

from kvcore.types import Sample, Span


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt with what a teacher wrote behind it.

    `sample`: text and spans of both together. `finish_reason`: `stop` where the teacher ended by itself or met a stop
    text, `length` where it was cut off. `tokens`: how many it wrote. `queue_s`, `write_s`: seconds it waited, and that
    its batch was being written.
    """

    sample: Sample
    finish_reason: str
    tokens: int
    queue_s: float
    write_s: float


def completed_sample(prompt: Sample, text: str, answer_marker: str) -> Sample:
    """The sample of a prompt and the text written behind it.

    The span `prompt` is the caller's, or the whole prompt. What was written is the reasoning, to the end of the first
    `answer_marker` in it; what follows is the answer. A span that would be empty is left out.
    """
    assert prompt.text is not None
    begin, end = len(prompt.text), len(prompt.text) + len(text)
    marker = text.find(answer_marker) if answer_marker else -1
    answer = end if marker < 0 else begin + marker + len(answer_marker)
    spans = list(prompt.spans) or [Span("prompt", 0, begin)]
    if answer > begin:
        spans.append(Span("reasoning", begin, answer))
    if end > answer:
        spans.append(Span("answer", answer, end))
    return Sample(prompt.id, text=prompt.text + text, spans=tuple(spans))
