"""Prepares the recipe's training and validation records once and keeps them with the run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.families import BASE, CHINESE, EXTENDED
from data.prompts import STYLES
from data.records import Record, content_digest, load_records, write_records
from experiments.recipe.build import DataFiles
from experiments.recipe.config import MIX, TRAIN_SAMPLES, VAL_SAMPLES, RecipeSettings
from experiments.recipe.early_checks import check_data, given_splits
from kvcore.errors import ConfigError, FieldError
from kvcore.files import write_json
from kvcore.models.backbone import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MARKER = "prepared.json"
# Settings that determine the records.
_DATA_SETTINGS = {
    "student_model_name_or_path",
    "max_length",
    "student_mode",
    "kv_compression",
    "dataset_name",
    "train_samples",
    "val_samples",
    "use_extended_datasets",
    "math23k_ratio",
    "data_dir",
    "seed",
}


def prepare_data(settings: RecipeSettings, directory: Path) -> DataFiles:
    """Writes train.jsonl and val.jsonl to `directory`, unless it has them from the same settings and files.

    Omits records longer than `max_length`. If the K/V of the reasoning are matched, it also omits records without
    reasoning. The log counts both.

    Raises:
        ConfigError: a dataset cannot be loaded or has no usable record; with what to do.
    """
    files = DataFiles.under(directory)
    digest = _digest(settings)
    marker = directory / _MARKER
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8"))["settings"] == digest:
        logger.info("data: using the prepared %s", directory)
        return files
    train, val = _records(settings)
    directory.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    for path, records in ((files.train, train), (files.val, val)):
        logger.info("data: %d %s records", len(records), path.stem)
        write_records(path, records)
    write_json(marker, {"settings": digest})
    return files


def _digest(settings: RecipeSettings) -> str:
    """A digest of everything that determines the records, including the files of a directory."""
    digest = hashlib.blake2b(settings.model_dump_json(include=_DATA_SETTINGS).encode(), digest_size=16)
    for path in given_splits(settings).values():
        digest.update(content_digest(path).encode())
    return digest.hexdigest()


def _records(settings: RecipeSettings) -> tuple[Sequence[Record], Sequence[Record]]:
    check_data(settings)
    given = given_splits(settings)
    if not given:
        return _mixed(settings)
    usable = {name: _usable(load_records(path), settings, name) for name, path in given.items()}
    limits = (settings.train_samples, settings.val_samples)
    train, val = (_first(usable[name], settings, name, limit) for name, limit in zip(usable, limits, strict=True))
    return train, val


def _first(records: Sequence[Record], settings: RecipeSettings, split: str, limit: int | None) -> list[Record]:
    """Returns the first `limit` records, or all, without those that are too long for training."""
    from data.collate import Collator  # noqa: PLC0415 - loads torch

    collator = Collator(_tokenizer(settings.student_model_name_or_path), settings.max_length)
    kept: list[Record] = []
    too_long = 0
    for record in records:
        if len(kept) == limit:
            break
        try:
            collator.tokens(record)
        except FieldError:
            too_long += 1
        else:
            kept.append(record)
    if too_long:
        logger.info("data: omitted %d %s records longer than --max_length %d", too_long, split, settings.max_length)
    if not kept:
        raise ConfigError(f"--max_length: every {split} record is longer than {settings.max_length} tokens")
    if limit is not None and len(kept) < limit:
        logger.warning("data: found only %d of the requested %d %s records", len(kept), limit, split)
    return kept


def _tokenizer(student: str) -> PreTrainedTokenizerBase:
    try:
        return read_tokenizer(student)
    except (OSError, ValueError) as error:
        raise FieldError("student.path", f"cannot load '{student}': {error}") from error


def _mixed(settings: RecipeSettings) -> tuple[Sequence[Record], Sequence[Record]]:
    from data.multi_task_dataset import MultiTaskReasoningDataset  # noqa: PLC0415 - loads Hugging Face datasets

    _tokenizer(settings.student_model_name_or_path)  # Reports a missing student before the data are read.
    mix = settings.dataset_name == (MIX,)
    named = BASE if mix else tuple(name for name in settings.dataset_name if name != CHINESE)
    chinese = mix or CHINESE in settings.dataset_name
    loader = MultiTaskReasoningDataset(
        base_datasets=list(named),
        extended_datasets=list(EXTENDED) if mix else [],
        use_extended=mix and settings.use_extended_datasets,
        math23k_ratio=settings.math23k_ratio if chinese else 0.0,
        train_samples=settings.train_samples or TRAIN_SAMPLES,
        val_samples=settings.val_samples or VAL_SAMPLES,
        data_dir=settings.data_dir,
        seed=settings.seed,
        styles=STYLES if _matches_whole_text(settings) else ("cot",),
        tokenizer=settings.student_model_name_or_path,
        max_tokens=settings.max_length,
    )
    train, val = loader.load_and_prepare()
    return [_as_record(row) for row in train.to_list()], [_as_record(row) for row in val.to_list()]


def _as_record(row: Mapping[str, Any]) -> Record:
    return Record(row["id"], row["prompt"], row["reasoning"], row["answer"], row["dataset"])


def _matches_whole_text(settings: RecipeSettings) -> bool:
    """Whether K/V of prompt and answer are matched too. If so, records without reasoning are usable."""
    return settings.student_mode == "token" and settings.kv_compression == "full"


def _usable(records: Sequence[Record], settings: RecipeSettings, split: str) -> list[Record]:
    """Returns the records that have tokens at which K/V are matched."""
    kept = [record for record in records if _matches_whole_text(settings) or record.reasoning]
    without = Counter(record.dataset or "one dataset" for record in records if not record.reasoning)
    if len(kept) < len(records):
        shown = ", ".join(f"{count} of {name}" for name, count in sorted(without.items()))
        logger.info("data: omitted %s records without reasoning: %s", split, shown)
    if not kept:
        raise ConfigError(f"--dataset_name: no {split} record has reasoning, but the K/V of the reasoning are matched")
    return kept
