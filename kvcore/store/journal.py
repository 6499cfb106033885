"""The store's bookkeeping: one JSON line per stored sample, and an index of where each line is.

A journal is only ever appended to. Every line ends with the xxh3 of what stands before it, so a line that a crash left
half written is told from one that was damaged later: the first can only be last, and is as if never written.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import xxhash
from pydantic import TypeAdapter, ValidationError

from kvcore.errors import StoreError
from kvcore.files import json_text, replace_file

logger = logging.getLogger(__name__)

FORMAT = 1
JOURNAL_SUFFIX = ".jsonl"
INDEX_NAME = "index.json"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a sample: `offset` and `size` in bytes from the start of the shard; `xxh3` in hexadecimal."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """One stored sample. `tensors` by part name, without the key that precedes it in the shard."""

    key: str
    sample_id: str
    shard: str
    tensors: dict[str, TensorEntry]
    relative_error: dict[str, list[float]]

    @property
    def end(self) -> int:
        """How many bytes the shard must have for this sample."""
        return max(tensor.offset + tensor.size for tensor in self.tensors.values())


class JournalPosition(NamedTuple):
    """Where a sample's line stands."""

    journal: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Index:
    """Every stored sample's line. `journals`: bytes of each that were read; `shards`: bytes that each must have."""

    journals: dict[str, int]
    shards: dict[str, int]
    samples: dict[str, JournalPosition]


_ENTRY: TypeAdapter[SampleEntry] = TypeAdapter(SampleEntry)
_INDEX: TypeAdapter[Index] = TypeAdapter(Index)


def to_line(entry: SampleEntry) -> bytes:
    """A journal line, with its newline."""
    return seal(asdict(entry)) + b"\n"


def parse_line(line: bytes) -> SampleEntry | None:
    """The entry of a line, or None where the line is torn or damaged."""
    content = unseal(line)
    if content is None:
        return None
    try:
        return _ENTRY.validate_json(content, strict=True)
    except ValidationError:
        return None


def seal(content: dict[str, Any]) -> bytes:
    """A JSON object in one line whose last member `check` is the xxh3 of the object without it."""
    text = json_text(content, separators=(",", ":")).encode()
    return text[:-1] + b',"check":"%s"}' % xxhash.xxh3_64_hexdigest(text).encode()


def unseal(sealed: bytes) -> bytes | None:
    """The object without its `check`, or None where it does not match."""
    head, found, check = sealed.rstrip(b"\n").rpartition(b',"check":"')
    text = head + b"}"
    return text if found and check == b'%s"}' % xxhash.xxh3_64_hexdigest(text).encode() else None


def scan(path: Path) -> tuple[list[tuple[SampleEntry, JournalPosition]], int]:
    """Reads a journal: its entries, and how many bytes of it are sound.

    Raises:
        StoreError: a damaged line with a sound one after it, so it is not the tail of a crash.
    """
    entries: list[tuple[SampleEntry, JournalPosition]] = []
    sound = offset = 0
    with path.open("rb") as file:
        for line in file:
            entry = parse_line(line) if line.endswith(b"\n") else None
            if entry is not None:
                if sound != offset:
                    raise StoreError(f"{path}: damaged at byte {sound}, with sound lines after it")
                entries.append((entry, JournalPosition(path.name, offset, len(line))))
                sound = offset + len(line)
            offset += len(line)
    if sound != offset:
        logger.warning("%s: ignoring %d bytes after byte %d that a crash left unfinished", path, offset - sound, sound)
    return entries, sound


def load_index(directory: Path) -> Index:
    """The merged index where it is as new as the journals, and the journals themselves otherwise.

    Raises:
        StoreError: a journal is damaged.
    """
    index = _read_index(directory / INDEX_NAME)
    if index is not None and index.journals == {path.name: path.stat().st_size for path in _journals(directory)}:
        return index
    return build_index(directory)


def build_index(directory: Path) -> Index:
    """Reads all journals; where two writers stored a sample, the first journal's is taken."""
    journals: dict[str, int] = {}
    shards: dict[str, int] = {}
    samples: dict[str, JournalPosition] = {}
    for path in _journals(directory):
        entries, journals[path.name] = scan(path)
        for entry, place in entries:
            samples.setdefault(entry.key, place)
            shards[entry.shard] = max(shards.get(entry.shard, 0), entry.end)
    return Index(journals, shards, samples)


def write_index(directory: Path, index: Index) -> None:
    """Puts the merged index in place, whole or not at all."""
    replace_file(directory / INDEX_NAME, seal({"format": FORMAT, **asdict(index)}))


def _journals(directory: Path) -> Iterator[Path]:
    yield from sorted(directory.glob(f"*{JOURNAL_SUFFIX}"))


def _read_index(path: Path) -> Index | None:
    try:
        content = unseal(path.read_bytes())
    except FileNotFoundError:
        return None
    if content is not None:
        tree = cast("dict[str, Any]", json.loads(content))
        if tree.pop("format", None) == FORMAT:
            return _INDEX.validate_python(tree)
    logger.warning("%s: damaged or of another version; reading the journals instead", path)
    return None


class JournalWriter:
    """Appends to one journal, which no other process may write meanwhile.

    Raises:
        StoreError: another process holds the journal, or it is damaged before its tail.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        try:
            _lock(self._file.fileno(), path)
            _, self._size = scan(path)
            # A torn tail would run into the next line.
            self._file.truncate(self._size)
        except BaseException:
            self._file.close()
            raise

    def append(self, entries: Iterable[SampleEntry]) -> None:
        """Adds entries and returns when the disk has them.

        Raises:
            StoreError: the disk did not take them; the journal is as before.
        """
        lines = b"".join(to_line(entry) for entry in entries)
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._size)
            raise StoreError(f"{self._path}: cannot append: {error}") from error
        self._size += len(lines)

    def close(self) -> None:
        """Gives up the journal. Safe to call twice."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(f"{path}: another process is writing to it; every writer needs a name of its own") from error
    except OSError as error:
        logger.warning("%s: this file system has no locks (%s): make sure that nobody else writes here", path, error)
