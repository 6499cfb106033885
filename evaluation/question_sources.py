"""Where the questions of a benchmark are read from: a local copy if there is one, else the Hugging Face hub.

lm-eval calls `load_docs` through `custom_dataset` of a task's YAML file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, load_dataset

from data.dataset_sources import DATA_DIR_VARIABLE, READ_ERRORS
from data.saved_dataset import is_saved, load_saved
from kvcore.errors import ConfigError

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


def load_docs(
    *,
    dataset: str,
    hub: str,
    split: str,
    columns: Sequence[str],
    config: str | None = None,
    subject: str | None = None,
    data_dir: str | None = None,
    **_metadata: Any,
) -> dict[str, Dataset]:
    """The rows that are evaluated.

    Args:
        dataset: the benchmark's name, and that of its local copy in `data_dir`.
        hub: its id on the Hugging Face hub.
        split: the only split that is read.
        columns: those that the task reads.
        config: the hub's configuration.
        subject: the part of a benchmark of several subjects; also its configuration on the hub.
        data_dir: the directory of local copies.
        _metadata: what else lm-eval hands over.

    Returns:
        the split's rows by its name.

    Raises:
        ConfigError: the rows cannot be had; names the dataset and how to provide it.
    """
    name = f"{dataset}/{subject}" if subject else dataset
    local = _local_copy(dataset, subject, split, Path(data_dir)) if data_dir else None
    try:
        rows = _read(local, split) if local else cast("Dataset", load_dataset(hub, subject or config, split=split))
    except READ_ERRORS as error:
        raise ConfigError(f"{name}: {_reason(error)}; {_how_to_provide(dataset, hub, subject, split)}") from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ConfigError(
            f"{name}: {local or hub} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}"
        )
    if not len(rows):
        raise ConfigError(f"{name}: {local or hub} holds no row of the split '{split}'")
    return {split: rows}


def _local_copy(dataset: str, subject: str | None, split: str, data_dir: Path) -> Path | None:
    """The copy in `data_dir`, if there is one; of several the one nearest to what is asked for."""
    copies = list(_possible_copies(dataset, subject, split, data_dir))
    found = next((path for path in copies if path.exists()), None)
    if found is None and subject and (data_dir / dataset).exists():
        raise ConfigError(
            f"{dataset}/{subject}: {data_dir / dataset} does not hold it; it should be {data_dir / dataset / subject}"
            f".jsonl, .json, .parquet or .arrow, or a directory {data_dir / dataset / subject}"
        )
    return found


def _possible_copies(dataset: str, subject: str | None, split: str, data_dir: Path) -> Iterator[Path]:
    place = data_dir / dataset / subject if subject else data_dir / dataset
    yield from (place / f"{split}{suffix}" for suffix in _BUILDERS)
    yield from (place.with_name(place.name + suffix) for suffix in _BUILDERS)
    yield place


def _read(path: Path, split: str) -> Dataset:
    if is_saved(path):
        return load_saved(path, split)
    # Streamed, so that no copy of the copy stays in a cache.
    if path.is_file():
        rows = load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train", streaming=True)
    else:
        rows = load_dataset(str(path), split=split, streaming=True)
    return Dataset.from_list(list(rows))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _how_to_provide(dataset: str, hub: str, subject: str | None, split: str) -> str:
    place = f"{dataset}/{subject}" if subject else dataset
    return (
        f"log in to the hub if '{hub}' is gated, or give a copy in its own columns: --data_dir DIR (or "
        f"${DATA_DIR_VARIABLE}) with DIR/{place}.jsonl, .json, .parquet or .arrow, or a directory DIR/{place} with "
        f"{split}.jsonl or a saved dataset"
    )
