"""Where a training dataset is read from: a local copy if there is one, else the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from datasets import IterableDataset

from data.families.base import Family, Row
from data.local_copies import DATA_DIR_VARIABLE, READ_ERRORS, find_copies, stream, stream_copy
from kvcore.errors import ConfigError, FieldError

# Rows held in memory while a large dataset is shuffled as it streams.
_SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True, slots=True)
class Source:
    """Where one dataset is read from. `path` is None for the hub."""

    family: Family
    path: Path | None

    def __str__(self) -> str:
        return str(self.path) if self.path else f"hub: {self.family.origin}"


def find_source(family: Family, local_paths: Mapping[str, str | Path], data_dir: Path | None) -> Source:
    """The local copy named in `local_paths`, else the one in `data_dir`, else the hub.

    In `data_dir` a copy is the directory NAME, or the file NAME.jsonl, .json, .parquet or .arrow.

    Raises:
        FieldError: a copy in `local_paths` does not exist, or `data_dir` holds several copies.
        ConfigError: there is no copy, and the dataset is not on the hub.
    """
    name = family.name
    if name in local_paths:
        path = Path(local_paths[name])
        if not path.exists():
            raise FieldError(f"local_paths.{name}", f"there is no {path}")
        return Source(family, path)
    found = find_copies(data_dir, name)
    if len(found) > 1:
        raise FieldError(f"local_paths.{name}", f"name one of {', '.join(map(str, found))}")
    if not found and family.hub is None:
        raise ConfigError(f"dataset '{name}' ({family.origin}) has no copy here; {_how_to_provide(name)}")
    return Source(family, found[0] if found else None)


def read_rows(source: Source, seed: int, max_rows: int) -> Iterator[Row]:
    """The rows of the training split; for a large dataset, a shuffled sample of at most `max_rows`.

    Raises:
        ConfigError: the dataset is not available, cannot be read, or lacks a column; says how to provide it.
    """
    family = source.family
    try:
        for rows in _streams(source):
            sample = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER).take(max_rows) if family.large else rows
            yield from _checked(family, cast("Iterable[Row]", sample))
    except (ConfigError, *READ_ERRORS) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"dataset '{family.name}' cannot be read from {source}: {reason}; {_how_to_provide(family.name)}"
        ) from error


def _streams(source: Source) -> Iterable[IterableDataset]:
    family = source.family
    if source.path is not None:
        return stream_copy(source.path, family.split, family.configs)
    assert family.hub is not None
    return [stream(family.hub, config, family.split) for config in family.configs or (None,)]


def _how_to_provide(name: str) -> str:
    return (
        f"provide a copy with the original columns as local_paths={{'{name}': PATH}} (a directory, .jsonl, .json, "
        f".parquet or .arrow), or put it into data_dir or ${DATA_DIR_VARIABLE} as {name}/ or {name}.jsonl"
    )


def _checked(family: Family, rows: Iterable[Row]) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        missing = [column for column in family.columns if column not in row]
        if missing:
            raise ConfigError(
                f"row {number} has no column {', '.join(missing)}; it has {', '.join(row)}, and "
                f"{', '.join(family.columns)} are needed"
            )
        yield row
