"""Rows of a directory that `datasets.Dataset.save_to_disk` wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, load_from_disk

from kvcore.errors import ConfigError

_MARKS = ("state.json", "dataset_dict.json")


def is_saved(path: Path) -> bool:
    """Whether the directory holds a saved dataset, or several splits of one."""
    return any((path / mark).is_file() for mark in _MARKS)


def load_saved(path: Path, split: str | None = None) -> Dataset:
    """Maps a saved dataset into memory; of several splits, the one asked for.

    Raises:
        ConfigError: no saved dataset, a damaged one, or several splits without that one.
    """
    if not is_saved(path):
        raise ConfigError(f"{path}: no data file, and no directory made by datasets.Dataset.save_to_disk")
    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: this saved dataset cannot be read: {error}") from error
    if isinstance(saved, Dataset):
        return saved
    if split not in saved:
        wanted = "name the directory of one" if split is None else f"there is no split '{split}'"
        raise ConfigError(f"{path}: holds the splits {', '.join(map(str, saved))}; {wanted}")
    return saved[split]


def saved_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a saved dataset, one after the other.

    Raises:
        ConfigError: as `load_saved`.
    """
    yield from cast("Iterable[dict[str, Any]]", load_saved(path))
