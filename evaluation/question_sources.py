"""Where the questions of a benchmark are read from: a local copy if there is one, else the Hugging Face hub.

lm-eval calls `load_docs` through `custom_dataset` in a task's YAML file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, load_dataset

from data.local_copies import DATA_DIR_VARIABLE, READ_ERRORS, find_copies, stream_copy
from kvcore.errors import ConfigError


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
    """Loads the questions of one benchmark or subject.

    Args:
        dataset: the benchmark's name, which is also the name of its local copy in `data_dir`.
        hub: its id on the Hugging Face hub.
        split: the split to read.
        columns: the columns that the task needs.
        config: the hub's configuration.
        subject: one subject of the benchmark, which is also its configuration on the hub.
        data_dir: the directory of local copies.
        _metadata: other arguments that lm-eval passes.

    Returns:
        the rows, keyed by split.

    Raises:
        ConfigError: the rows are not available; names the dataset and how to provide it.
    """
    name = f"{dataset}/{subject}" if subject else dataset
    copy = _find_copy(name, dataset, Path(data_dir)) if data_dir else None
    config = subject or config
    try:
        if copy is None:
            rows = cast("Dataset", load_dataset(hub, config, split=split))
        else:
            rows = Dataset.from_list(
                [row for part in stream_copy(copy, split, [config] if config else []) for row in part]
            )
    except READ_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{name}: {reason}; log in to the hub if '{hub}' is gated, or provide a copy with the original columns: "
            f"--data_dir DIR (or ${DATA_DIR_VARIABLE}) with DIR/{name}.jsonl, .json, .parquet or .arrow, or a "
            f"directory DIR/{name} with {split}.jsonl or a saved dataset"
        ) from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ConfigError(
            f"{name}: {copy or hub} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}"
        )
    if not len(rows):
        raise ConfigError(f"{name}: {copy or hub} has no rows in the split '{split}'")
    return {split: rows}


def _find_copy(name: str, dataset: str, data_dir: Path) -> Path | None:
    """The local copy, or None if `data_dir` holds nothing of the dataset."""
    copies = find_copies(data_dir, name)
    if not copies and (data_dir / dataset).exists():
        place = data_dir / name
        raise ConfigError(
            f"{name}: {data_dir / dataset} does not contain it; expected {place}.jsonl, .json, .parquet or .arrow, or "
            f"a directory {place}"
        )
    return copies[0] if copies else None
