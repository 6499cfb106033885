"""The journals of a store, with one JSON line per sample, and an index of the lines.

Journals are append-only. Every line ends with the xxh3 of its content. An incomplete last line is the result of a crash
and is ignored; a bad line before a good one is damage and raises an error.
"""

from __future__ import annotations

import contextlib
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
    """One stored sample. `tensors` by part name, without the sample key that prefixes it in the shard."""

    key: str
    sample_id: str
    shard: str
    tensors: dict[str, TensorEntry]
    relative_error: dict[str, list[float]]

    @property
    def end(self) -> int:
        """The smallest size in bytes of a shard that holds this sample."""
        return max((tensor.offset + tensor.size for tensor in self.tensors.values()), default=0)


class JournalPosition(NamedTuple):
    """The position of a sample's line."""

    journal: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Index:
    """The lines of all samples. `journals`: bytes read of each journal; `shards`: smallest size of each shard."""

    journals: dict[str, int]
    shards: dict[str, int]
    samples: dict[str, JournalPosition]


_ENTRY: TypeAdapter[SampleEntry] = TypeAdapter(SampleEntry)
_INDEX: TypeAdapter[Index] = TypeAdapter(Index)


def to_line(entry: SampleEntry) -> bytes:
    """Serialises an entry as a journal line, with its newline."""
    return seal(asdict(entry)) + b"\n"


def parse_line(line: bytes) -> SampleEntry | None:
    """Parses a line; None if it is incomplete or damaged."""
    content = unseal(line)
    if content is None:
        return None
    try:
        return _ENTRY.validate_json(content, strict=True)
    except ValidationError:
        return None


def seal(content: dict[str, Any]) -> bytes:
    """Serialises a JSON object in one line and appends the member `check`, the xxh3 of the object without it."""
    text = json_text(content, separators=(",", ":")).encode()
    return text[:-1] + b',"check":"%s"}' % xxhash.xxh3_64_hexdigest(text).encode()


def unseal(sealed: bytes) -> bytes | None:
    """Returns the object without its `check`, or None if the check fails."""
    head, found, check = sealed.rstrip(b"\n").rpartition(b',"check":"')
    text = head + b"}"
    return text if found and check == b'%s"}' % xxhash.xxh3_64_hexdigest(text).encode() else None


def scan(path: Path) -> tuple[list[tuple[SampleEntry, JournalPosition]], int]:
    """Reads a journal and returns its entries and the number of valid bytes.

    Raises:
        StoreError: a damaged line before a valid one, so a crash is not the cause.
    """
    entries: list[tuple[SampleEntry, JournalPosition]] = []
    sound = offset = 0
    with path.open("rb") as file:
        for line in file:
            entry = parse_line(line) if line.endswith(b"\n") else None
            if entry is not None:
                if sound != offset:
                    raise StoreError(f"{path}: damaged at byte {sound}, with valid lines after it")
                entries.append((entry, JournalPosition(path.name, offset, len(line))))
                sound = offset + len(line)
            offset += len(line)
    if sound != offset:
        logger.warning("%s: ignoring %d bytes after byte %d that a crash left unfinished", path, offset - sound, sound)
    return entries, sound


def load_index(directory: Path) -> Index:
    """Loads the merged index if it is up to date; otherwise builds one from the journals.

    Raises:
        StoreError: a journal is damaged.
    """
    index = _read_index(directory / INDEX_NAME)
    if index is not None and index.journals == {path.name: path.stat().st_size for path in _journals(directory)}:
        return index
    return build_index(directory)


def build_index(directory: Path) -> Index:
    """Builds an index from all journals; if several hold the same sample, the first journal's entry is used."""
    journals: dict[str, int] = {}
    shards: dict[str, int] = {}
    samples: dict[str, JournalPosition] = {}
    for path in _journals(directory):
        entries, journals[path.name] = scan(path)
        for entry, position in entries:
            samples.setdefault(entry.key, position)
            shards[entry.shard] = max(shards.get(entry.shard, 0), entry.end)
    return Index(journals, shards, samples)


def write_index(directory: Path, index: Index) -> None:
    """Writes the merged index atomically."""
    replace_file(directory / INDEX_NAME, seal({"format": FORMAT, **asdict(index)}))


def _journals(directory: Path) -> Iterator[Path]:
    yield from sorted(directory.glob(f"*{JOURNAL_SUFFIX}"))


def _read_index(path: Path) -> Index | None:
    try:
        content = unseal(path.read_bytes())
    except FileNotFoundError:
        return None
    if content is not None:
        # A sealed index may still hold what no version wrote.
        with contextlib.suppress(ValueError, RecursionError):
            tree = cast("dict[str, Any]", json.loads(content))
            if tree.pop("format", None) == FORMAT:
                return _INDEX.validate_python(tree)
    logger.warning("%s: damaged or of another version; reading the journals instead", path)
    return None


class JournalWriter:
    """Appends to one journal, and locks it against other processes.

    Raises:
        StoreError: another process has locked the journal, or a line before the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        try:
            _lock(self._file.fileno(), path)
            _, self._size = scan(path)
            # Otherwise the next line would be appended to an incomplete one.
            self._file.truncate(self._size)
        except BaseException:
            self._file.close()
            raise

    def append(self, entries: Iterable[SampleEntry]) -> None:
        """Appends entries and syncs them to disk.

        Raises:
            StoreError: the entries could not be written; the journal is unchanged.
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
        """Closes and unlocks the journal. Safe to call twice."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(f"{path}: another process is writing to it; give every writer a different name") from error
    except OSError as error:
        logger.warning("%s: no file locks here (%s); make sure that no other process writes to it", path, error)
