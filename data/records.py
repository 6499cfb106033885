"""Training and evaluation samples on disk: `id`, `prompt`, `reasoning` and `answer`.

A file of JSON Lines, or a directory that `datasets.Dataset.save_to_disk` wrote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from kvcore.errors import ConfigError, FieldError
from kvcore.plan import SpanKind
from kvcore.types import Sample, Span

_FIELDS = ("id", "prompt", "reasoning", "answer")
_CHUNK_BYTES = 1 << 20
_MAY_BE_EMPTY = frozenset({"reasoning", "dataset"})


@dataclass(frozen=True, slots=True)
class Record:
    """One question with its worked reasoning and its answer; the texts are joined as they stand, spaces included.

    `dataset`: where it comes from, empty if that isn't said; validation tells its figures apart by it.
    """

    id: str
    prompt: str
    reasoning: str
    answer: str
    dataset: str = ""

    @property
    def text(self) -> str:
        """All parts, one after the other."""
        return self.prompt + self.reasoning + self.answer

    def sample(self) -> Sample:
        """The whole text as a teacher reads it, with the character range of each part that is not empty."""
        parts: tuple[tuple[SpanKind, str], ...] = (
            ("prompt", self.prompt),
            ("reasoning", self.reasoning),
            ("answer", self.answer),
        )
        spans: list[Span] = []
        start = 0
        for kind, part in parts:
            if part:
                spans.append(Span(kind, start, start + len(part)))
            start += len(part)
        return Sample(self.id, text=self.text, spans=tuple(spans))


def load_records(path: Path, limit: int | None = None) -> list[Record]:
    """Reads the first `limit` records of a file or a saved dataset, or all; keys beyond `Record`'s are ignored.

    Raises:
        ConfigError: there is no such file or saved dataset, or it holds no record.
        FieldError: a line is not a JSON object, or a field is missing, no text, empty where it may not be, or
            an id that an earlier record has; names file, line or row, and field.
    """
    records: list[Record] = []
    place_of_id: dict[str, str] = {}
    for place, tree in islice(_rows(path), limit):
        where = f"{path}:{place}"
        record = to_record(tree, where)
        if record.id in place_of_id:
            raise FieldError(f"{where}: id", f"'{record.id}' is the id of {place_of_id[record.id]} already")
        place_of_id[record.id] = f"{'row' if path.is_dir() else 'line'} {place}"
        records.append(record)
    if not records:
        raise ConfigError(f"{path}: holds no record")
    return records


def to_record(tree: Mapping[str, Any], where: str) -> Record:
    """The record of a line or row; keys beyond `Record`'s are ignored.

    Raises:
        FieldError: a field is missing, no text, or empty where it may not be; names `where` and the field.
    """
    dataset = _text(tree, "dataset", where) if "dataset" in tree else ""
    return Record(**{name: _text(tree, name, where) for name in _FIELDS}, dataset=dataset)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes one record a line, replacing the file; a dataset that isn't said is left out."""
    trees = (asdict(record) for record in records)
    lines = (
        json.dumps({name: text for name, text in tree.items() if text or name in _FIELDS}, ensure_ascii=False) + "\n"
        for tree in trees
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)


def content_digest(path: Path) -> str:
    """32 hexadecimal digits of what a file or a saved dataset holds, wherever it is and whenever it was written.

    Raises:
        ConfigError: it is not there.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such data file or directory; docs/data.md says how to make one")
    digest = hashlib.blake2b(digest_size=16)
    # Beside its rows a saved dataset has notes that differ from one writing to the next.
    for part in sorted(path.glob("*.arrow")) if path.is_dir() else [path]:
        with part.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of `range(count)` that depends on nothing but the arguments."""
    generator = np.random.default_rng((seed % 2**64, epoch))
    return generator.permutation(count).tolist()


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Each record with its line, or its row, counted from 1."""
    if path.is_dir():
        # Imported where it is needed: most runs read JSON Lines, and the library takes a second to load.
        from data.saved_dataset import saved_rows  # noqa: PLC0415

        return enumerate(saved_rows(path), start=1)
    if not path.is_file():
        raise ConfigError(f"{path}: no such data file or directory; docs/data.md says how to make one")
    return ((number, parse_line(line, f"{path}:{number}")) for number, line in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # Bytes, so that only \n ends a line: text mode would also end one at characters that JSON strings may hold.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def parse_line(line: bytes, where: str) -> Mapping[str, Any]:
    """The JSON object of one line.

    Raises:
        FieldError: it is no UTF-8, no JSON, or no object; names `where`.
    """
    try:
        raw: object = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise FieldError(where, f"not valid UTF-8: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise FieldError(where, f"not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise FieldError(where, f"expected a JSON object, found {type(raw).__name__}")
    return cast("dict[str, Any]", raw)


def _text(tree: Mapping[str, Any], name: str, where: str) -> str:
    if name not in tree:
        raise FieldError(f"{where}: {name}", f"is missing; a record needs {', '.join(_FIELDS)}")
    value = tree[name]
    if not isinstance(value, str):
        raise FieldError(f"{where}: {name}", f"expected text, found {type(value).__name__} ({value!r:.80})")
    if not value and name not in _MAY_BE_EMPTY:
        raise FieldError(f"{where}: {name}", "may not be empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FieldError(f"{where}: {name}", f"holds half of a surrogate pair at character {error.start}") from error
    return value
