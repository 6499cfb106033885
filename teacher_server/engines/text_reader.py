"""Tokenizes samples for every engine: text or token ids to tokens, and spans to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, get_args

from kvcore.errors import FieldError
from kvcore.plan import SpanKind
from kvcore.types import Chat, Sample, Span
from teacher_server.engines.base import SPAN_KINDS, TokenizedSample

NO_SPAN = -1
# Tokens of ordinary text are shorter; only runs of one character, such as spaces, give longer ones.
MAX_CHARACTERS_PER_TOKEN = 64
KNOWN_KINDS: tuple[str, ...] = get_args(SpanKind)


class TextReader(Protocol):
    """The interface of a tokenizer to `read_sample`."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids: valid ids are 0 to `vocabulary - 1`."""
        ...

    def read(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids with the model's special tokens, and byte ends as in `kvcore.types.EncodedSampleKV`."""
        ...

    def read_chat(self, text: str, chat: Chat, field: str) -> tuple[list[int], list[int]]:
        """Like `read`, in the model's chat template, whose tokens have no byte end. `field` is for errors."""
        ...

    def byte_ends(self, token_ids: Sequence[int]) -> list[int]:
        """Byte ends of token ids in the text that they decode to; all -1 if they do not encode back to the same ids."""
        ...


def read_sample(sample: Sample, reader: TextReader, max_tokens: int) -> TokenizedSample:
    """Tokenize a sample and map its spans to tokens.

    Raises:
        FieldError: names `samples[<id>].<field>`, what is wrong with it, and the limit.
    """
    field = f"samples[{sample.id}]"
    if (sample.text is None) == (sample.token_ids is None):
        raise FieldError(field, "needs exactly one of text and token_ids")
    if sample.chat is not None and sample.text is None:
        raise FieldError(f"{field}.chat", "a chat template needs text, but the sample has token_ids")
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
    characters = len(text) + (len(sample.chat.system_prompt) if sample.chat else 0)
    if characters > max_tokens * MAX_CHARACTERS_PER_TOKEN:
        raise FieldError(
            f"{field}.text",
            f"has {characters} characters; this teacher takes at most {max_tokens} tokens (max_sample_tokens) of "
            f"{MAX_CHARACTERS_PER_TOKEN} characters",
        )
    spans = _checked_spans(sample.spans, len(text), "characters", field)
    chat = sample.chat
    token_ids, byte_ends = reader.read(text) if chat is None else reader.read_chat(text, chat, f"{field}.chat")
    if not token_ids:
        raise FieldError(f"{field}.text", "has no tokens")
    _check_length(len(token_ids), max_tokens, f"{field}.text")
    _check_vocabulary(token_ids, reader.vocabulary, f"{field}.text")
    byte_spans = [Span(span.kind, _bytes_before(text, span.start), _bytes_before(text, span.end)) for span in spans]
    # The span of a token's last byte; a token whose last byte is unknown is in no span.
    span_ids = [_span_of(end - 1, byte_spans) if end > 0 else NO_SPAN for end in byte_ends]
    return TokenizedSample(sample, tuple(token_ids), tuple(byte_ends), tuple(span_ids))


def _read_token_ids(
    sample: Sample, token_ids: tuple[int, ...], reader: TextReader, max_tokens: int, field: str
) -> TokenizedSample:
    if not token_ids:
        raise FieldError(f"{field}.token_ids", "is empty")
    _check_length(len(token_ids), max_tokens, f"{field}.token_ids")
    _check_vocabulary(token_ids, reader.vocabulary, f"{field}.token_ids")
    spans = _checked_spans(sample.spans, len(token_ids), "tokens", field)
    span_ids = [_span_of(place, spans) for place in range(len(token_ids))]
    return TokenizedSample(sample, token_ids, tuple(reader.byte_ends(token_ids)), tuple(span_ids))


def _check_length(tokens: int, max_tokens: int, field: str) -> None:
    if tokens > max_tokens:
        raise FieldError(field, f"has {tokens} tokens; this teacher takes at most {max_tokens} (max_sample_tokens)")


def _check_vocabulary(token_ids: Sequence[int], vocabulary: int, field: str) -> None:
    for place, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocabulary:
            raise FieldError(field, f"token {place} has the id {token_id}; the model has 0 to {vocabulary - 1}")


def _checked_spans(spans: Sequence[Span], length: int, unit: str, field: str) -> list[Span]:
    """The spans sorted by start, after a check that each kind occurs once and that none overlap."""
    seen: dict[str, Span] = {}  # at most one span per kind, so there are few comparisons
    for place, span in enumerate(spans):
        where = f"{field}.spans[{place}]"
        if span.kind not in KNOWN_KINDS:
            raise FieldError(where, f"unknown kind '{span.kind}'; known: {', '.join(KNOWN_KINDS)}")
        if not 0 <= span.start <= span.end <= length:
            raise FieldError(where, f"{_describe(span)} does not lie in the sample, which has {length} {unit}")
        if span.kind in seen:
            raise FieldError(where, f"a second span of kind '{span.kind}'; each kind may occur once")
        for other in seen.values():
            if span.start < other.end and other.start < span.end:
                raise FieldError(where, f"{_describe(span)} overlaps {_describe(other)}")
        seen[span.kind] = span
    return sorted(spans, key=lambda span: span.start)


def _describe(span: Span) -> str:
    return f"'{span.kind}' ({span.start} to {span.end})"


def _span_of(place: int, spans: Sequence[Span]) -> int:
    for span in spans:
        if span.start <= place < span.end:
            return SPAN_KINDS.index(span.kind)
    return NO_SPAN


def _bytes_before(text: str, character: int) -> int:
    return len(text[:character].encode())
