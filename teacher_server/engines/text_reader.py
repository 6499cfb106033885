"""How every engine reads a sample: text or token ids to tokens, characters to bytes, spans to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

from kvcore.errors import FieldError
from kvcore.plan import SpanKind
from kvcore.types import Sample, Span
from teacher_server.engines.base import SPAN_KINDS, TokenizedSample

NO_SPAN = -1
# Tokens of ordinary text are shorter; only runs of one character, such as spaces, have longer ones.
MAX_CHARACTERS_PER_TOKEN = 64
KNOWN_KINDS: tuple[str, ...] = get_args(SpanKind)


class TextReader(Protocol):
    """A tokenizer as a teacher uses it."""

    @property
    def vocabulary(self) -> int:
        """Token ids are 0 to this, exclusive."""
        ...

    def read(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids with the model's special tokens, and byte ends as in `kvcore.types.EncodedSampleKV`."""
        ...

    def byte_ends(self, token_ids: Sequence[int]) -> list[int]:
        """Byte ends of given token ids in the text that they stand for; all -1 where that cannot be told."""
        ...


def read_sample(sample: Sample, reader: TextReader, max_tokens: int) -> TokenizedSample:
    """Tokenises a sample and places its spans.

    Raises:
        FieldError: naming `samples[<id>].<field>`, what is wrong with it, and the limit.
    """
    field = f"samples[{sample.id}]"
    if (sample.text is None) == (sample.token_ids is None):
        raise FieldError(field, "needs exactly one of text and token_ids")
    if sample.text is not None:
        return _read_text(sample, sample.text, reader, max_tokens, field)
    assert sample.token_ids is not None
    return _read_token_ids(sample, sample.token_ids, reader, max_tokens, field)


def _read_text(sample: Sample, text: str, reader: TextReader, max_tokens: int, field: str) -> TokenizedSample:
    if not text:
        raise FieldError(f"{field}.text", "is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError(f"{field}.text", f"character {error.start} is a lone surrogate: not valid text") from error
    if len(text) > max_tokens * MAX_CHARACTERS_PER_TOKEN:
        raise FieldError(
            f"{field}.text",
            f"has {len(text)} characters, too many for the {max_tokens} tokens that this teacher takes at most "
            f"(max_sample_tokens): the limit is {MAX_CHARACTERS_PER_TOKEN} characters per token",
        )
    spans = _checked_spans(sample.spans, len(text), "characters", field)
    token_ids, byte_ends = reader.read(text)
    if not token_ids:
        raise FieldError(f"{field}.text", "reads as no token at all")
    _check_length(len(token_ids), max_tokens, f"{field}.text")
    _check_vocabulary(token_ids, reader.vocabulary, f"{field}.text")
    placed = [_Placed(span.kind, _bytes_before(text, span.start), _bytes_before(text, span.end)) for span in spans]
    # A token's last byte decides; where it is not known, the token is in no span.
    span_ids = [_span_of(end - 1, placed) if end > 0 else NO_SPAN for end in byte_ends]
    return TokenizedSample(sample, tuple(token_ids), tuple(byte_ends), tuple(span_ids))


def _read_token_ids(
    sample: Sample, token_ids: tuple[int, ...], reader: TextReader, max_tokens: int, field: str
) -> TokenizedSample:
    if not token_ids:
        raise FieldError(f"{field}.token_ids", "is empty")
    _check_length(len(token_ids), max_tokens, f"{field}.token_ids")
    _check_vocabulary(token_ids, reader.vocabulary, f"{field}.token_ids")
    spans = _checked_spans(sample.spans, len(token_ids), "tokens", field)
    placed = [_Placed(span.kind, span.start, span.end) for span in spans]
    span_ids = [_span_of(place, placed) for place in range(len(token_ids))]
    return TokenizedSample(sample, token_ids, tuple(reader.byte_ends(token_ids)), tuple(span_ids))


def _check_length(tokens: int, max_tokens: int, field: str) -> None:
    if tokens > max_tokens:
        raise FieldError(field, f"has {tokens} tokens; this teacher takes at most {max_tokens} (max_sample_tokens)")


def _check_vocabulary(token_ids: Sequence[int], vocabulary: int, field: str) -> None:
    for place, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocabulary:
            raise FieldError(field, f"token {place} has the id {token_id}; the model knows 0 to {vocabulary - 1}")


def _checked_spans(spans: Sequence[Span], length: int, unit: str, field: str) -> list[Span]:
    """The spans in order of their start, each kind at most once, none touching another's range."""
    seen: dict[str, Span] = {}  # at most one span of each kind, so the comparisons stay few
    for place, span in enumerate(spans):
        where = f"{field}.spans[{place}]"
        if span.kind not in KNOWN_KINDS:
            raise FieldError(where, f"unknown kind '{span.kind}'; known: {', '.join(KNOWN_KINDS)}")
        if not 0 <= span.start <= span.end <= length:
            raise FieldError(where, f"{_describe(span)} does not lie in the sample, which has {length} {unit}")
        if span.kind in seen:
            raise FieldError(where, f"a second span of kind '{span.kind}'; each kind may come once")
        for other in seen.values():
            if span.start < other.end and other.start < span.end:
                raise FieldError(where, f"{_describe(span)} overlaps {_describe(other)}")
        seen[span.kind] = span
    return sorted(spans, key=lambda span: span.start)


def _describe(span: Span) -> str:
    return f"'{span.kind}' ({span.start} to {span.end})"


@dataclass(frozen=True, slots=True)
class _Placed:
    """A span in bytes of the text, or in token indices."""

    kind: SpanKind
    start: int
    end: int


def _span_of(place: int, spans: Sequence[_Placed]) -> int:
    for span in spans:
        if span.start <= place < span.end:
            return SPAN_KINDS.index(span.kind)
    return NO_SPAN


def _bytes_before(text: str, character: int) -> int:
    return len(text[:character].encode())
