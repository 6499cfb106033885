"""Records on disk: `id`, `prompt`, `reasoning` and `answer`.

Either a JSON Lines file or a directory written by `datasets.Dataset.save_to_disk`.
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
    """One question with its reasoning and answer. The texts are concatenated unchanged, including spaces.

    `dataset`: where it comes from, or empty; validation reports metrics per dataset.
    """

    id: str
    prompt: str
    reasoning: str
    answer: str
    dataset: str = ""

    @property
    def text(self) -> str:
        """Prompt, reasoning and answer, concatenated."""
        return self.prompt + self.reasoning + self.answer

    def sample(self) -> Sample:
        """The sample to send to a teacher: the whole text, with a span for each part that is not empty."""
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
    """Reads the first `limit` records of a file or a saved dataset, or all. Ignores keys that `Record` does not have.

    Raises:
        ConfigError: there is no such file or saved dataset, or it has no records.
        FieldError: a line is not a JSON object; or a field is missing, not a string, empty although required, or a
            duplicate id. Names the file, the line or row, and the field.
    """
    records: list[Record] = []
    place_of_id: dict[str, str] = {}
    for place, tree in islice(_rows(path), limit):
        where = f"{path}:{place}"
        record = to_record(tree, where)
        if record.id in place_of_id:
            raise FieldError(f"{where}: id", f"'{record.id}' is already the id of {place_of_id[record.id]}")
        place_of_id[record.id] = f"{'row' if path.is_dir() else 'line'} {place}"
        records.append(record)
    if not records:
        raise ConfigError(f"{path}: has no records")
    return records


def to_record(tree: Mapping[str, Any], where: str) -> Record:
    """Converts a line or row to a record. Ignores keys that `Record` does not have.

    Raises:
        FieldError: a field is missing, not a string, or empty although required; names `where` and the field.
    """
    dataset = _text(tree, "dataset", where) if "dataset" in tree else ""
    return Record(**{name: _text(tree, name, where) for name in _FIELDS}, dataset=dataset)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes one record per line, replacing the file. An empty `dataset` is omitted."""
    trees = (asdict(record) for record in records)
    lines = (
        json.dumps({name: text for name, text in tree.items() if text or name in _FIELDS}, ensure_ascii=False) + "\n"
        for tree in trees
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)


def content_digest(path: Path) -> str:
    """A digest (32 hexadecimal digits) of the content of a file or saved dataset, independent of its path and age.

    Raises:
        ConfigError: the path does not exist.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such data file or directory; docs/data.md says how to make one")
    digest = hashlib.blake2b(digest_size=16)
    # A saved dataset also has metadata files, which differ each time it is saved.
    for part in sorted(path.glob("*.arrow")) if path.is_dir() else [path]:
        with part.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of `range(count)` that depends only on the arguments."""
    generator = np.random.default_rng((seed % 2**64, epoch))
    return generator.permutation(count).tolist()


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields each record with its line or row number, from 1."""
    if path.is_dir():
        # Imported here because most runs read JSON Lines, and `datasets` takes a second to import.
        from data.saved_dataset import saved_rows  # noqa: PLC0415

        return enumerate(saved_rows(path), start=1)
    if not path.is_file():
        raise ConfigError(f"{path}: no such data file or directory; docs/data.md says how to make one")
    return ((number, parse_line(line, f"{path}:{number}")) for number, line in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # Read as bytes, so that only \n ends a line: text mode also splits at characters that JSON strings may contain.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def parse_line(line: bytes, where: str) -> Mapping[str, Any]:
    """Parses the JSON object of one line.

    Raises:
        FieldError: the line is not valid UTF-8, not JSON, or not an object; names `where`.
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
        raise FieldError(f"{where}: {name}", f"missing; a record needs {', '.join(_FIELDS)}")
    value = tree[name]
    if not isinstance(value, str):
        raise FieldError(f"{where}: {name}", f"expected a string, found {type(value).__name__} ({value!r:.80})")
    if not value and name not in _MAY_BE_EMPTY:
        raise FieldError(f"{where}: {name}", "must not be empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FieldError(f"{where}: {name}", f"has an unpaired surrogate at character {error.start}") from error
    return value
