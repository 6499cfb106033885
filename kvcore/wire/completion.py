"""A prompt that a teacher completed, as an ordinary sample; both sides compute the same one."""

from __future__ import annotations

from dataclasses import dataclass

from kvcore.types import Sample, Span


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt followed by the text that a teacher generated.

    `sample`: prompt and generated text, with their spans. `finish_reason`: `stop` if the teacher ended by itself or
    reached a stop text, `length` if the token limit cut it off. `tokens`: how many were generated. `queue_s`,
    `generate_s`: seconds that the prompt waited, and that its batch took to generate.
    """

    sample: Sample
    finish_reason: str
    tokens: int
    queue_s: float
    generate_s: float


def completed_sample(prompt: Sample, text: str, answer_marker: str) -> Sample:
    """Appends generated text to a prompt.

    The span `prompt` is the caller's, or the whole prompt. The generated text is reasoning up to and including the
    first `answer_marker`, and answer after it. Empty spans are left out.
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
