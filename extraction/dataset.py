"""Reads a dataset on disk row by row; only the offsets of rows are kept in memory."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from data.records import Record, parse_line, to_record
from kvcore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Item:
    """A record with its style and task type for the .pt file; the task type may be empty."""

    record: Record
    style: str
    task_type: str


class _Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Mapping[str, Any]: ...


class Items:
    """The first `limit` items of a JSON Lines file or a saved dataset, or all. Thread-safe.

    Raises:
        ConfigError: there is no such dataset, or it has no records.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self._path = path
        self._rows = _saved(path) if path.is_dir() else _Lines(path)
        self._count = len(self._rows) if limit is None else min(limit, len(self._rows))
        if not self._count:
            raise ConfigError(f"{path}: has no records")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Item:
        """Returns item `row`, from 0.

        Raises:
            FieldError: the row is not a valid record; names the row and the field.
        """
        tree = self._rows[row]
        record = to_record(tree, f"{self._path}:{row + 1}")
        # Without a style, records with reasoning are chains of thought.
        style = tree.get("style") or ("cot" if record.reasoning else "direct")
        return Item(record, str(style), str(tree.get("task_type") or ""))


class _Lines:
    """The objects of a JSON Lines file; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(f"{path}: no such data file or directory; docs/data.md says how to make one")
        self._path = path
        self._starts = array("Q")
        start = 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    self._starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        with self._path.open("rb") as file:
            file.seek(self._starts[row])
            return parse_line(file.readline(), f"{self._path}:{row + 1}")


def _saved(path: Path) -> _Rows:
    # Imported here because `datasets` takes a second to import.
    from data.saved_dataset import load_saved  # noqa: PLC0415

    return cast("_Rows", load_saved(path))
