"""Where a dataset's rows are read from: a local copy if there is one, else the Hugging Face hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from datasets import IterableDataset, get_dataset_config_names, load_dataset
from datasets.exceptions import DatasetsError

from data.families.base import Family, Row
from data.saved_dataset import is_saved, load_saved
from kvcore.errors import ConfigError, FieldError

DATA_DIR_VARIABLE = "KVDISTILL_DATA_DIR"
_BUILDERS = {".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
_SUFFIXES = (*_BUILDERS, ".json")
# Rows held while a large dataset is shuffled as it is read.
_SHUFFLE_BUFFER = 10_000
# pyarrow's errors are ValueErrors, a hub that does not answer is an OSError.
READ_ERRORS = (OSError, ValueError, DatasetsError)


@dataclass(frozen=True, slots=True)
class Source:
    """Where one dataset is read from; `path` None: the hub."""

    family: Family
    path: Path | None

    def __str__(self) -> str:
        return str(self.path) if self.path else f"hub: {self.family.origin}"


def find_source(family: Family, local_paths: Mapping[str, str | Path], data_dir: Path | None) -> Source:
    """The local copy named in `local_paths`, else the one in `data_dir`, else the hub.

    In `data_dir` a copy is NAME, a directory, or the file NAME.jsonl, .json, .parquet or .arrow.

    Raises:
        ConfigError: a named copy is not there, `data_dir` holds several, or there is none and the dataset is not on
            the hub.
    """
    name = family.name
    if name in local_paths:
        path = Path(local_paths[name])
        if not path.exists():
            raise FieldError(f"local_paths.{name}", f"there is no {path}")
        return Source(family, path)
    names = [name, *(name + suffix for suffix in _SUFFIXES)]
    found = [data_dir / each for each in names if (data_dir / each).exists()] if data_dir else []
    if len(found) > 1:
        raise FieldError(f"local_paths.{name}", f"name one of {', '.join(map(str, found))}")
    if not found and family.hub is None:
        raise ConfigError(f"dataset '{name}' ({family.origin}) has no copy here; {_how_to_provide(name)}")
    return Source(family, found[0] if found else None)


def default_data_dir() -> Path | None:
    """The directory of local copies that the environment names, if any."""
    named = os.environ.get(DATA_DIR_VARIABLE)
    return Path(named) if named else None


def read_rows(source: Source, seed: int, most_rows: int) -> Iterator[Row]:
    """The rows of the dataset's training split; of a large one a shuffled part of at most `most_rows`.

    Raises:
        ConfigError: the dataset cannot be had, cannot be read, or lacks a column; names it and how to provide it.
    """
    family = source.family
    try:
        for rows in _parts(source):
            part = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER).take(most_rows) if family.large else rows
            yield from _checked(family, cast("Iterable[Row]", part))
    except ConfigError:
        raise
    except READ_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"dataset '{family.name}' cannot be read from {source}: {reason}; {_how_to_provide(family.name)}"
        ) from error


def _how_to_provide(name: str) -> str:
    return (
        f"give a copy in its own columns as local_paths={{'{name}': PATH}} (a directory, .jsonl, .json, .parquet or "
        f".arrow), or put it into data_dir or ${DATA_DIR_VARIABLE} as {name}/ or {name}.jsonl"
    )


def _checked(family: Family, rows: Iterable[Row]) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        missing = [column for column in family.columns if column not in row]
        if missing:
            raise ConfigError(
                f"dataset '{family.name}': row {number} has no column {', '.join(missing)}; "
                f"it has {', '.join(row)}, and {', '.join(family.columns)} are needed"
            )
        yield row


def _parts(source: Source) -> Iterator[IterableDataset]:
    """One stream for each configuration; nothing is copied into a cache."""
    family, path = source.family, source.path
    if path is None:
        assert family.hub is not None
        yield from (_stream(family.hub, config, family.split) for config in family.configs or (None,))
    elif path.is_file():
        yield _file(path)
    elif is_saved(path):
        yield load_saved(path, family.split).to_iterable_dataset()
    elif (only := _only_json(path)) is not None:
        yield _file(only)
    else:
        yield from (_stream(str(path), config, family.split) for config in _configs_in(path, family))


def _stream(place: str, config: str | None, split: str) -> IterableDataset:
    return cast("IterableDataset", load_dataset(place, config, split=split, streaming=True))


def _configs_in(path: Path, family: Family) -> list[str]:
    """The family's configurations where the directory declares them, as a copy of the hub's repository does."""
    there = get_dataset_config_names(str(path))
    if there == ["default"]:
        return there
    missing = [config for config in family.configs if config not in there]
    if missing or not family.configs:
        raise ConfigError(
            f"dataset '{family.name}': {path} has the configurations {', '.join(there)}, "
            f"needed are {', '.join(family.configs or ('default',))}"
        )
    return list(family.configs)


def _file(path: Path) -> IterableDataset:
    if path.suffix == ".json":
        return IterableDataset.from_generator(_json_objects, gen_kwargs={"path": path})
    if path.suffix not in _BUILDERS:
        raise ConfigError(f"{path}: expected a file that ends in {', '.join(_SUFFIXES)}")
    builder = _BUILDERS[path.suffix]
    return cast("IterableDataset", load_dataset(builder, data_files=str(path), split="train", streaming=True))


def _only_json(directory: Path) -> Path | None:
    files = [path for path in directory.iterdir() if path.suffix in _SUFFIXES]
    return files[0] if len(files) == 1 and files[0].suffix == ".json" else None


def _json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON file: one array, or one object after the other on any number of lines (as Math23K)."""
    text = path.read_text(encoding="utf-8")
    decoder, place = json.JSONDecoder(), 0
    while (place := _next_place(text, place)) < len(text):
        value, place = decoder.raw_decode(text, place)
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, dict):
                raise ConfigError(f"{path}: expected JSON objects, found {type(each).__name__}")
            yield cast("dict[str, Any]", each)


def _next_place(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place
