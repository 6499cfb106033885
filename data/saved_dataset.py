"""Reads directories written by `datasets.Dataset.save_to_disk`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, load_from_disk

from kvcore.errors import ConfigError

_MARKERS = ("state.json", "dataset_dict.json")


def is_saved(path: Path) -> bool:
    """Whether the directory is a saved dataset, with or without splits."""
    return any((path / name).is_file() for name in _MARKERS)


def load_saved(path: Path, split: str | None = None) -> Dataset:
    """Memory-maps a saved dataset, or one split of it.

    Raises:
        ConfigError: there is no saved dataset, it is damaged or empty, or it does not have the split.
    """
    if not is_saved(path):
        raise ConfigError(f"{path}: neither a data file nor a directory saved with datasets.Dataset.save_to_disk")
    try:
        if _is_empty(path):
            raise ConfigError(f"{path}: has no records")
        saved = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: cannot read the saved dataset: {error}") from error
    if isinstance(saved, Dataset):
        return saved
    if split not in saved:
        problem = "name the directory of one split" if split is None else f"there is no split '{split}'"
        raise ConfigError(f"{path}: has the splits {', '.join(map(str, saved))}; {problem}")
    return saved[split]


def _is_empty(path: Path) -> bool:
    """Whether the saved dataset has no files of rows; the library fails on it with an error that names nothing."""
    state = path / "state.json"
    return state.is_file() and not json.loads(state.read_text(encoding="utf-8"))["_data_files"]


def saved_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a saved dataset; raises ConfigError like `load_saved`."""
    yield from cast("Iterable[dict[str, Any]]", load_saved(path))
