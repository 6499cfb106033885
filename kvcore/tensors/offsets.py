"""Computes at which byte of the text each token ends; an end is exact, or unknown.

A tokenizer's own offsets are in characters, are the same for tokens that share a character, lose combining marks that a
normaliser composed, and may exclude spaces. Therefore a token's bytes are taken from its spelling, and used only if the
concatenated bytes equal the text.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from kvcore.errors import FieldError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

UNKNOWN = -1

_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's space
# Characters after which a continuation is read. At least one of them does not share a token with the text.
_BEFORE = ("\n", "a", "1")
_READING_SETTINGS = ("add_bos_token", "add_eos_token", "split_special_tokens")


def read_text(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> tuple[list[int], list[int]]:
    """Tokenises a text, without truncation.

    Returns:
        The token ids, and for each how many bytes of the UTF-8 text have been read after it, never decreasing; -1 if
        that is unknown because the token ends inside a character, or if the token stands for no text.

    Raises:
        FieldError: the tokenizer has no offsets, or the text cannot be encoded as UTF-8.
    """
    byte_at = _byte_positions(text)
    _require_offsets(tokenizer)
    encoding = _encode(tokenizer, text, add_special_tokens)
    return encoding.ids, _byte_ends(tokenizer, encoding, text, byte_at)


def adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a space before a text, as SentencePiece's do in their older form."""
    _require_offsets(tokenizer)
    spellings = _encode(tokenizer, "a", add_special_tokens=False).tokens
    return any(b"".join(pieces).startswith(b" ") for pieces in _readings(spellings))


def read_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Like `read_text` without special tokens, for a text that continues another one: no space is put before it.

    The text is read after a character, whose tokens are then left out.

    Raises:
        FieldError: the text's first token always holds the character before it, too.
    """
    if not text:
        return [], []
    for before in _BEFORE:
        ids, ends = read_text(tokenizer, before + text, add_special_tokens=False)
        if 1 in ends:
            first = len(ends) - ends[::-1].index(1)
            return ids[first:], [end - 1 if end > 0 else end for end in ends[first:]]
    raise FieldError("tokenizer", f"cannot read '{text[:20]}' as the continuation of a text without a space before it")


def fingerprint(tokenizer: PreTrainedTokenizerBase, *, with_template: bool = False) -> str:
    """BLAKE2b of everything that affects tokenisation: the tokenizer's definition and special-token settings.

    `with_template`: includes the chat template, if the tokenizer has one.

    Raises:
        FieldError: the tokenizer is slow, so its definition cannot be read.
    """
    _require_offsets(tokenizer)
    definition: dict[str, Any] = json.loads(_backend(tokenizer).to_str())
    # Earlier calls may have set these; they are not part of the definition.
    definition["truncation"] = definition["padding"] = None
    settings = {name: getattr(tokenizer, name, None) for name in _READING_SETTINGS}
    template: object = getattr(tokenizer, "chat_template", None)
    if with_template and template:
        settings["chat_template"] = template
    canonical = json.dumps([definition, settings], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


class _Token(NamedTuple):
    """A token's spelling, and the characters that it covers according to the tokenizer."""

    spelling: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Source:
    """A text and the tokenizer's normaliser."""

    text: str
    byte_at: Sequence[int]
    normalise: Callable[[str], str] | None

    def piece(self, start: int, end: int) -> bytes:
        return self.text[start:end].encode()

    def normalised(self, start: int, end: int) -> bytes:
        piece = self.text[start:end]
        return (self.normalise(piece) if self.normalise else piece).encode()

    def is_changed(self) -> bool:
        """Whether normalising changes more than spaces."""
        whole = len(self.text)
        return _without_space_style(self.normalised(0, whole)) != _without_space_style(self.piece(0, whole))


def _byte_ends(tokenizer: PreTrainedTokenizerBase, encoding: Encoding, text: str, byte_at: Sequence[int]) -> list[int]:
    spellings = encoding.tokens
    text_tokens = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
    ends = [UNKNOWN] * len(spellings)
    if not text_tokens:
        return ends
    found = _exact_ends([spellings[index] for index in text_tokens], text.encode(), 0)
    if found is None:
        normaliser = _backend(tokenizer).normalizer
        source = _Source(text, byte_at, None if normaliser is None else normaliser.normalize_str)
        offsets = encoding.offsets
        found = _ends_by_run([_Token(spellings[index], *offsets[index]) for index in text_tokens], source)
    reached = 0
    for index, end in zip(text_tokens, found, strict=True):
        if end > 0 and end >= reached:
            ends[index] = reached = end
    return ends


def _exact_ends(spellings: Sequence[str], original: bytes, start: int) -> list[int] | None:
    """Each token's end if the tokens' bytes equal `original`, which begins at byte `start`; otherwise None.

    Extra spaces before `original` are allowed: a tokenizer adds one before a text, or excludes them from offsets. A
    token that consists of them has no end.
    """
    for pieces in _readings(spellings):
        joined = b"".join(pieces)
        surplus = len(joined) - len(original)
        if surplus >= 0 and joined.endswith(original) and not joined[:surplus].strip(b" "):
            own = accumulate(map(len, pieces))
            return [start + end - surplus if end > surplus else UNKNOWN for end in own]
    return None


def _ends_by_run(tokens: Sequence[_Token], source: _Source) -> list[int]:
    """Like `_exact_ends`, run by run, for a text that the normaliser changed or that has unknown characters."""
    changed = source.is_changed()
    runs = list(_runs(tokens, source.text if changed else ""))
    limits = [following[0].start for _, following in pairwise(runs)] + [len(source.text)]
    return [end for run, limit in zip(runs, limits, strict=True) for end in _run_ends(run, limit, source, changed)]


def _run_ends(run: Sequence[_Token], limit: int, source: _Source, changed: bool) -> list[int]:
    """Ends of one run's tokens; the run may extend up to character `limit`, where the next run starts."""
    start, end = min(token.start for token in run), max(token.end for token in run)
    spellings = [token.spelling for token in run]
    unknown = [UNKNOWN] * (len(run) - 1)
    if start == end:
        return [*unknown, _end_of_trimmed(spellings, end, source)]
    # After the given end there may be marks that the normaliser composed into the run, or spaces trimmed from it.
    for reach in range(end, max(end, limit) + 1):
        if changed and _is_mark_at(source.text, reach):
            continue
        exact = _exact_ends(spellings, source.piece(start, reach), source.byte_at[start])
        if exact is not None:
            return exact
        if _reads_as(spellings, source.normalised(start, reach)):
            return [*unknown, source.byte_at[reach]]
    # An unknown character: its offset is right unless the normaliser changed the text.
    return [*unknown, UNKNOWN if changed else source.byte_at[end]]


def _is_mark_at(text: str, index: int) -> bool:
    """Whether the character is a combining mark, which a normaliser may move or compose with the one before."""
    return unicodedata.combining(text[index : index + 1] or " ") != 0


def _end_of_trimmed(spellings: Sequence[str], end: int, source: _Source) -> int:
    """The end of a run whose offsets are empty after trimming: known if the text before it ends with its spelling."""
    read = source.piece(0, end)
    spelt = (b"".join(pieces) for pieces in _readings(spellings))
    return source.byte_at[end] if any(read.endswith(piece.lstrip(b" ") or piece) for piece in spelt) else UNKNOWN


def _runs(tokens: Sequence[_Token], changed_text: str) -> Iterator[list[_Token]]:
    """Splits tokens where one starts at or after the end of all earlier ones, but not before a mark in changed text."""
    run: list[_Token] = []
    reached = 0
    for token in tokens:
        if run and token.start >= reached and not _is_mark_at(changed_text, token.start):
            yield run
            run = []
        run.append(token)
        reached = max(reached, token.end)
    yield run


def _reads_as(spellings: Sequence[str], normalised: bytes) -> bool:
    wanted = _without_space_style(normalised)
    return any(_without_space_style(b"".join(pieces)) == wanted for pieces in _readings(spellings))


def _without_space_style(text: bytes) -> bytes:
    """Removes leading spaces and writes the other ones as plain spaces."""
    return text.replace(_SPACE_MARK.encode(), b" ").lstrip(b" ")


def _readings(spellings: Sequence[str]) -> Iterator[list[bytes]]:
    """The bytes that tokens may stand for, in the byte-level alphabet and in SentencePiece's spelling.

    Callers try both, because a tokenizer's definition does not say which one it uses.
    """
    yield list(map(_byte_level_bytes, spellings))
    yield list(map(_sentencepiece_bytes, spellings))


@lru_cache(maxsize=1 << 16)
def _byte_level_bytes(spelling: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in spelling)
    except KeyError:
        # Added tokens, such as chat role markers, are spelt literally.
        return spelling.encode()


@lru_cache(maxsize=1 << 16)
def _sentencepiece_bytes(spelling: str) -> bytes:
    if len(spelling) == len("<0xE4>") and spelling.startswith("<0x") and spelling.endswith(">"):
        return bytes.fromhex(spelling[3:5])
    return spelling.replace(_SPACE_MARK, " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the other bytes are mapped from U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def _byte_positions(text: str) -> Sequence[int]:
    """The byte at which each character starts, and the total number of bytes."""
    if text.isascii():
        return range(len(text) + 1)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError("text", f"character {error.start} is a lone surrogate, which UTF-8 cannot encode") from error
    return [0, *accumulate(len(character.encode()) for character in text)]


def _require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise FieldError(
            "tokenizer",
            f"{type(tokenizer).__name__} has no offsets; use a fast tokenizer (one with a tokenizer.json), which "
            "byte-exact alignment needs",
        )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> Encoding:
    batch = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    encodings = batch.encodings
    assert encodings is not None, "a fast tokenizer returns its encodings"
    return encodings[0]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    return cast("Tokenizer", cast("Any", tokenizer).backend_tokenizer)
