"""Local copies of datasets: finds them in a directory and streams their rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from datasets import IterableDataset, get_dataset_config_names, load_dataset
from datasets.exceptions import DatasetsError

from data.saved_dataset import is_saved, load_saved
from kvcore.errors import ConfigError

DATA_DIR_VARIABLE = "KVDISTILL_DATA_DIR"
# pyarrow raises ValueError, and an unreachable hub OSError.
READ_ERRORS = (OSError, ValueError, DatasetsError)
_BUILDERS = {".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
_SUFFIXES = (*_BUILDERS, ".json", ".txt")


def default_data_dir() -> Path | None:
    """The directory of local copies named by `$KVDISTILL_DATA_DIR`, or None."""
    named = os.environ.get(DATA_DIR_VARIABLE)
    return Path(named) if named else None


def find_copies(data_dir: Path | None, name: str) -> list[Path]:
    """Copies of a dataset in `data_dir`: the files NAME.jsonl, .parquet, .arrow, .json, .txt; then the folder NAME."""
    if data_dir is None:
        return []
    return [path for suffix in (*_SUFFIXES, "") if (path := data_dir / f"{name}{suffix}").exists()]


def stream_copy(path: Path, split: str, configs: Sequence[str] = ()) -> Iterator[IterableDataset]:
    """Streams a local copy, without a second copy in a cache.

    Args:
        path: a file; or a directory: a saved dataset, one with the file SPLIT.jsonl, .json, .txt, .parquet or
            .arrow, or one that `datasets.load_dataset` reads, such as a clone from the hub.
        split: the split to read; a file is one split.
        configs: configurations to read if the directory declares any.

    Yields:
        one stream per configuration.

    Raises:
        ConfigError: the file's suffix is unknown, or the split or a configuration is missing.
        One of READ_ERRORS: the content cannot be read.
    """
    if is_saved(path):
        yield load_saved(path, split).to_iterable_dataset()
    elif (file := _file_of(path, split)) is not None:
        yield _stream_file(file)
    else:
        yield from (stream(str(path), config, split) for config in _configs_in(path, configs))


def stream(source: str, config: str | None, split: str) -> IterableDataset:
    """Streams one configuration and split of a hub id or directory."""
    return cast("IterableDataset", load_dataset(source, config, split=split, streaming=True))


def _configs_in(path: Path, wanted: Sequence[str]) -> Sequence[str]:
    """The configurations to read of those that the directory declares."""
    declared = get_dataset_config_names(str(path))
    if declared == ["default"] or (len(declared) == 1 and not wanted):
        return declared
    if not wanted or not set(wanted) <= set(declared):
        raise ConfigError(f"it has the configurations {', '.join(declared)}, not {', '.join(wanted or ('default',))}")
    return wanted


def _file_of(path: Path, split: str) -> Path | None:
    """The file to read: `path` itself, the file named after the split, or a directory's only .json file."""
    if path.is_file():
        return path
    files = [file for file in path.iterdir() if file.suffix in _SUFFIXES]
    named = [file for file in files if file.stem == split]
    # Other text files are notes or licences.
    data = [file for file in files if file.suffix != ".txt"]
    return (named or [file for file in data if len(data) == 1 and file.suffix == ".json"] or [None])[0]


def _stream_file(path: Path) -> IterableDataset:
    if path.suffix in _READERS:
        return IterableDataset.from_generator(_READERS[path.suffix], gen_kwargs={"path": path})
    if path.suffix not in _BUILDERS:
        raise ConfigError(f"{path}: expected a file that ends in {', '.join(_SUFFIXES)}")
    builder = _BUILDERS[path.suffix]
    return cast("IterableDataset", load_dataset(builder, data_files=str(path), split="train", streaming=True))


def _json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON file: one array, or consecutive objects on any number of lines (as in Math23K)."""
    text = _text(path).strip()
    decoder, position = json.JSONDecoder(), 0
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not valid JSON: {error}") from error
        position += len(text[position:]) - len(text[position:].lstrip())
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, dict):
                raise ConfigError(f"{path}: expected JSON objects, found {type(each).__name__}")
            yield cast("dict[str, Any]", each)


def _text_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines `question||steps #### answer` of a text file, GSM8K-Aug's original format, as columns."""
    # Only \n ends a line; a question may hold other line separators.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        question, bar, rest = line.rpartition("||")
        steps, mark, answer = rest.rpartition("####")
        if not (bar and mark):
            raise ConfigError(f"{path}:{number}: expected 'question||steps #### answer', found '{line:.60}'")
        yield {"question": question, "steps": steps, "answer": answer}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid UTF-8: {error}") from error


_READERS = {".json": _json_objects, ".txt": _text_lines}
