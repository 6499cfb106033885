"""Records on disk: `id`, `prompt`, `reasoning` and `answer`.

Either a JSON Lines file or a directory written by `datasets.Dataset.save_to_disk`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from kvcore.errors import ConfigError, FieldError, did_you_mean
from kvcore.plan import SpanKind
from kvcore.types import ROLES, Chat, Role, Sample, Span, Turn

_FIELDS = ("id", "prompt", "reasoning", "answer")
_CHUNK_BYTES = 1 << 20
_MAY_BE_EMPTY = frozenset({"reasoning", "dataset"})
_ASKING: Role = "user"
_BETWEEN_TURNS = "\n"
_OWN_COLUMNS: Mapping[str, str] = {name: name for name in (*_FIELDS, "dataset")}


@dataclass(frozen=True, slots=True)
class Record:
    """One question with its reasoning and answer. The texts are concatenated unchanged, including spaces.

    `dataset`: where it comes from, or empty; validation reports metrics per dataset. `turns`: role and content of each
    message if the prompt is a conversation; `prompt` holds the contents on lines of their own then.
    """

    id: str
    prompt: str
    reasoning: str
    answer: str
    dataset: str = ""
    turns: tuple[tuple[Role, str], ...] = ()

    @property
    def text(self) -> str:
        """Prompt, reasoning and answer, concatenated."""
        return self.prompt + self.reasoning + self.answer

    def chat(self, system_prompt: str = "") -> Chat:
        """How chat templates wrap the text. A conversation with a system message of its own does not get another."""
        turns: list[Turn] = []
        start = 0
        for role, content in self.turns or ((_ASKING, self.prompt),):
            turns.append(Turn(role, start, start + len(content)))
            start += len(content) + len(_BETWEEN_TURNS)
        return Chat(tuple(turns), "" if turns[0].role == "system" else system_prompt)

    def sample(self, chat: Chat | None = None) -> Sample:
        """The sample to send to a teacher: the whole text, with a span for each part that is not empty.

        `chat`: for a teacher that reads the text in its chat template.
        """
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
        return Sample(self.id, text=self.text, spans=tuple(spans), chat=chat)


def load_records(path: Path, limit: int | None = None, columns: Mapping[str, str] | None = None) -> list[Record]:
    """Reads the first `limit` records of a file or a saved dataset, or all. Ignores columns that no field is read from.

    Args:
        path: JSON Lines, or a directory of a saved dataset.
        limit: number of records; all by default.
        columns: the column of each field that is not in the column of its own name (`data.columns`). If any is given, a
            file without ids gets FILE:LINE as ids. Without a column `reasoning` there is no reasoning.

    Raises:
        ConfigError: there is no such file or saved dataset, or it has no records.
        FieldError: a line is not a JSON object; or a column is missing; or a value is not a string, empty although
            required, or a duplicate id. Names the file, the line or row, and the column.
    """
    records: list[Record] = []
    place_of_id: dict[str, str] = {}
    found: Mapping[str, str] = {}
    for place, tree in islice(_rows(path), limit):
        where = f"{path}:{place}"
        found = found or _find_columns(tree, columns or {}, where)
        record = to_record(tree, where, found, f"{path.name}:{place}")
        if record.id in place_of_id:
            raise FieldError(f"{where}: id", f"'{record.id}' is already the id of {place_of_id[record.id]}")
        place_of_id[record.id] = f"{'row' if path.is_dir() else 'line'} {place}"
        records.append(record)
    if not records:
        raise ConfigError(f"{path}: has no records")
    return records


def _find_columns(first: Mapping[str, Any], wanted: Mapping[str, str], where: str) -> Mapping[str, str]:
    """The column of each field; the first record decides which columns a file has.

    Raises:
        FieldError: a column of `wanted` does not exist, or no column is known for a field.
    """
    found = {**_OWN_COLUMNS, **wanted}
    for name, column in found.items():
        if name in wanted and column not in first:
            near = did_you_mean(column, list(first))
            raise FieldError(f"data.columns.{name}", f"{where} has no column '{column}'; {_it_has(first)}{near}")
    without = {"reasoning", "id"} if wanted else {"reasoning"}
    return {name: column for name, column in found.items() if column in first or name not in without}


def to_record(
    tree: Mapping[str, Any], where: str, columns: Mapping[str, str] = _OWN_COLUMNS, default_id: str = ""
) -> Record:
    """Converts a line or row to a record. Ignores other columns.

    Args:
        tree: the columns of one line or row.
        where: its file and line, for errors.
        columns: the column of each field. Without one for them, a record has no reasoning, and `default_id` as its id.
        default_id: see `columns`.

    Raises:
        FieldError: a text is missing, not a string, or empty although required; or a column is present although
            `columns` does not have its field. Names `where` and the column.
    """
    texts = {"id": default_id, "reasoning": ""}
    turns: tuple[tuple[Role, str], ...] = ()
    for name in _FIELDS:
        if name not in columns:
            if name in tree:
                raise FieldError(
                    f"{where}: {name}", "all records need the same columns, and the first record does not have this one"
                )
        elif name == "prompt" and isinstance(tree.get(columns[name]), list):
            turns = _turns(tree[columns[name]], f"{where}: {columns[name]}")
            texts[name] = _BETWEEN_TURNS.join(content for _, content in turns)
        else:
            texts[name] = _text(tree, columns[name], name, where)
    column = columns.get("dataset", "dataset")
    dataset = _text(tree, column, "dataset", where) if column in tree else ""
    return Record(**texts, dataset=dataset, turns=turns)


def _turns(messages: Sequence[Any], where: str) -> tuple[tuple[Role, str], ...]:
    """Role and content of each message of a conversation, which a user's message ends."""
    turns: list[tuple[Role, str]] = []
    for place, message in enumerate(messages):
        field = f"{where}.{place}"
        if not isinstance(message, Mapping):
            raise FieldError(field, f"expected an object with role and content, found {type(message).__name__}")
        tree = cast("Mapping[str, Any]", message)
        role = tree.get("role")
        if role not in ROLES:
            raise FieldError(f"{field}.role", f"expected one of {', '.join(ROLES)}; got {role!r:.80}")
        if role == "system" and place > 0:
            raise FieldError(f"{field}.role", "a system message must be the first")
        turns.append((role, _checked_text(tree.get("content"), f"{field}.content", may_be_empty=False)))
    if not turns or turns[-1][0] != _ASKING:
        raise FieldError(where, f"the last message must have the role '{_ASKING}'")
    return tuple(turns)


def _it_has(tree: Mapping[str, Any]) -> str:
    return f"it has the columns {', '.join(tree) or 'none'}"


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes one record per line, replacing the file. An empty `dataset` is omitted."""
    lines = (json.dumps(_tree(record), ensure_ascii=False) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)


def _tree(record: Record) -> dict[str, Any]:
    tree: dict[str, Any] = {name: getattr(record, name) for name in _FIELDS}
    if record.turns:
        tree["prompt"] = [{"role": role, "content": content} for role, content in record.turns]
    return tree | ({"dataset": record.dataset} if record.dataset else {})


def content_digest(path: Path) -> str:
    """A digest (32 hexadecimal digits) of the content of a file or saved dataset, independent of its path and age.

    Raises:
        ConfigError: the path does not exist.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such data file or directory; docs/data.md describes how to create it")
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
        raise ConfigError(f"{path}: no such data file or directory; docs/data.md describes how to create it")
    return ((number, parse_line(line, f"{path}:{number}")) for number, line in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # Read as bytes, so that only \n ends a line: text mode also splits at characters that JSON strings may contain.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def parse_line(line: bytes, where: str) -> Mapping[str, Any]:
    """Parses the JSON object of one line, after a byte-order mark if it has one.

    Raises:
        FieldError: the line is not valid UTF-8, not JSON, or not an object; names `where`.
    """
    try:
        raw: object = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise FieldError(where, f"not valid UTF-8: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise FieldError(where, f"not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise FieldError(where, f"expected a JSON object, found {type(raw).__name__}")
    return cast("dict[str, Any]", raw)


def _text(tree: Mapping[str, Any], column: str, name: str, where: str) -> str:
    """The text of field `name`."""
    if column not in tree:
        raise FieldError(
            f"{where}: {column}",
            f"missing; a record needs {', '.join(_FIELDS)}; {_it_has(tree)}; data.columns.{name} sets another column",
        )
    return _checked_text(tree[column], f"{where}: {column}", may_be_empty=name in _MAY_BE_EMPTY)


def _checked_text(value: Any, field: str, *, may_be_empty: bool) -> str:
    if not isinstance(value, str):
        raise FieldError(field, f"expected a string, found {type(value).__name__} ({value!r:.80})")
    if not value and not may_be_empty:
        raise FieldError(field, "must not be empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FieldError(field, f"has an unpaired surrogate at character {error.start}") from error
    return value
