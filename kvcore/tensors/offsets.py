"""Where each token ends in the bytes of the text it was read from, exactly or not at all.

A tokenizer's own offsets are in characters, repeat for tokens that share one, lose combining marks that a normaliser
composed, and may be trimmed of spaces. So what a token's bytes are is read from its spelling, and believed only where
the bytes, put together, are those of the text.
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

_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece writes a space so
_READING_SETTINGS = ("add_bos_token", "add_eos_token", "split_special_tokens")


def read_text(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> tuple[list[int], list[int]]:
    """Tokenises a text, without truncation.

    Returns:
        The token ids, and for each how many bytes of the UTF-8 text have been read with it, never decreasing; -1 where
        a token ends inside a character in a way that cannot be told, or stands for no text.

    Raises:
        FieldError: the tokenizer gives no offsets, or the text has no UTF-8 form.
    """
    byte_at = _byte_positions(text)
    _require_offsets(tokenizer)
    encoding = _encode(tokenizer, text, add_special_tokens)
    return encoding.ids, _byte_ends(tokenizer, encoding, text, byte_at)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """BLAKE2b over all that decides how a text is read: the tokenizer's definition and its special-token settings.

    Raises:
        FieldError: the tokenizer has no definition that can be read (a slow one).
    """
    _require_offsets(tokenizer)
    definition: dict[str, Any] = json.loads(_backend(tokenizer).to_str())
    # What an earlier call left there is no part of the definition.
    definition["truncation"] = definition["padding"] = None
    settings = {name: getattr(tokenizer, name, None) for name in _READING_SETTINGS}
    canonical = json.dumps([definition, settings], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


class _Token(NamedTuple):
    """A token's spelling, and the characters that the tokenizer says it covers."""

    spelling: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Source:
    """The text that was read, and what the tokenizer makes of it before it cuts it."""

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
        return _but_for_spaces(self.normalised(0, whole)) != _but_for_spaces(self.piece(0, whole))


def _byte_ends(tokenizer: PreTrainedTokenizerBase, encoding: Encoding, text: str, byte_at: Sequence[int]) -> list[int]:
    spellings = encoding.tokens
    for_text = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
    ends = [UNKNOWN] * len(spellings)
    if not for_text:
        return ends
    found = _exact_ends([spellings[place] for place in for_text], text.encode(), 0)
    if found is None:
        normaliser = _backend(tokenizer).normalizer
        source = _Source(text, byte_at, None if normaliser is None else normaliser.normalize_str)
        offsets = encoding.offsets
        found = _ends_by_run([_Token(spellings[place], *offsets[place]) for place in for_text], source)
    reached = 0
    for place, end in zip(for_text, found, strict=True):
        if end > 0 and end >= reached:
            ends[place] = reached = end
    return ends


def _exact_ends(spellings: Sequence[str], original: bytes, start: int) -> list[int] | None:
    """Each token's end where their bytes are `original`, which begins at byte `start`; None where they are not.

    Spaces ahead of `original` are let pass: a tokenizer puts one of its own before a text, or trims them from offsets.
    A token that lies wholly in them has no end.
    """
    for pieces in _readings(spellings):
        joined = b"".join(pieces)
        surplus = len(joined) - len(original)
        if surplus >= 0 and joined.endswith(original) and not joined[:surplus].strip(b" "):
            own = accumulate(map(len, pieces))
            return [start + end - surplus if end > surplus else UNKNOWN for end in own]
    return None


def _ends_by_run(tokens: Sequence[_Token], source: _Source) -> list[int]:
    """As `_exact_ends`, run by run, for a text that normalising changed or that holds unknown characters."""
    changed = source.is_changed()
    runs = list(_runs(tokens, source.text if changed else ""))
    limits = [following[0].start for _, following in pairwise(runs)] + [len(source.text)]
    return [end for run, limit in zip(runs, limits, strict=True) for end in _run_ends(run, limit, source, changed)]


def _run_ends(run: Sequence[_Token], limit: int, source: _Source, changed: bool) -> list[int]:
    """Ends of the tokens of one run, which may have read up to character `limit`, where the next run starts."""
    start, end = min(token.start for token in run), max(token.end for token in run)
    spellings = [token.spelling for token in run]
    unknown = [UNKNOWN] * (len(run) - 1)
    if start == end:
        return [*unknown, _end_of_trimmed(spellings, end, source)]
    # Past the end as given lie marks that the normaliser composed into the run, or spaces trimmed from it.
    for reach in range(end, max(end, limit) + 1):
        if changed and _is_mark_at(source.text, reach):
            continue
        exact = _exact_ends(spellings, source.piece(start, reach), source.byte_at[start])
        if exact is not None:
            return exact
        if _reads_as(spellings, source.normalised(start, reach)):
            return [*unknown, source.byte_at[reach]]
    # An unknown character: its place is right unless normalising moved things.
    return [*unknown, UNKNOWN if changed else source.byte_at[end]]


def _is_mark_at(text: str, index: int) -> bool:
    """Whether a combining mark stands there, which a normaliser may compose with what is before it, or move."""
    return unicodedata.combining(text[index : index + 1] or " ") != 0


def _end_of_trimmed(spellings: Sequence[str], end: int, source: _Source) -> int:
    """The end of a run whose characters were all trimmed from its offsets: known if it is spelt just before it."""
    read = source.piece(0, end)
    spelt = (b"".join(pieces) for pieces in _readings(spellings))
    return source.byte_at[end] if any(read.endswith(piece.lstrip(b" ") or piece) for piece in spelt) else UNKNOWN


def _runs(tokens: Sequence[_Token], changed_text: str) -> Iterator[list[_Token]]:
    """Cuts tokens where one starts at or after the end of all before it, but not ahead of a mark in a changed text."""
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
    wanted = _but_for_spaces(normalised)
    return any(_but_for_spaces(b"".join(pieces)) == wanted for pieces in _readings(spellings))


def _but_for_spaces(text: bytes) -> bytes:
    """A text without the spaces ahead of it, and with one spelling of those inside."""
    return text.replace(_SPACE_MARK.encode(), b" ").lstrip(b" ")


def _readings(spellings: Sequence[str]) -> Iterator[list[bytes]]:
    """The bytes that tokens may stand for: spelt in the byte-level alphabet, or as SentencePiece spells them.

    Both are tried, since a definition does not say plainly which it is, and the text shows which was right.
    """
    yield list(map(_byte_level_bytes, spellings))
    yield list(map(_sentencepiece_bytes, spellings))


@lru_cache(maxsize=1 << 16)
def _byte_level_bytes(spelling: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in spelling)
    except KeyError:
        # Added tokens, such as a chat's role marks, are spelt as they are written.
        return spelling.encode()


@lru_cache(maxsize=1 << 16)
def _sentencepiece_bytes(spelling: str) -> bytes:
    if len(spelling) == len("<0xE4>") and spelling.startswith("<0x") and spelling.endswith(">"):
        return bytes.fromhex(spelling[3:5])
    return spelling.replace(_SPACE_MARK, " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def _byte_positions(text: str) -> Sequence[int]:
    """The byte at which each character starts, and the number of bytes at the end."""
    if text.isascii():
        return range(len(text) + 1)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError("text", f"character {error.start} is a lone surrogate, which has no UTF-8 form") from error
    return [0, *accumulate(len(character.encode()) for character in text)]


def _require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise FieldError(
            "tokenizer",
            f"{type(tokenizer).__name__} gives no offsets; byte-exact alignment needs a tokenizer that the tokenizers "
            "library runs (one with a tokenizer.json)",
        )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> Encoding:
    batch = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    encodings = batch.encodings
    assert encodings is not None, "a fast tokenizer hands over its encodings"
    return encodings[0]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    return cast("Tokenizer", cast("Any", tokenizer).backend_tokenizer)
