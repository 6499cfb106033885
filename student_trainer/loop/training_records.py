"""Reads the training and validation records of a run, as student and teachers are to read them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from data.reasoning_steps import without_last_step
from data.records import Record, load_records
from kvcore.errors import FieldError
from student_trainer.config import DataConfig

_FIELD = "data.drop_last_step"


def train_records(settings: DataConfig) -> list[Record]:
    """The records of `data.train`, without the last step of their reasoning if `data.drop_last_step` is set.

    Raises:
        ConfigError: as for `load_records`.
        FieldError: the last step of a record cannot be told from other text, or no record has more than one step.
    """
    whole = load_records(settings.train, columns=settings.columns.names())
    records = _shortened(whole, settings)
    if settings.drop_last_step and records == whole:
        raise FieldError(
            _FIELD,
            f"none of the {len(whole):,} training samples has more than one step; data.steps is '{settings.steps}'",
        )
    return records


def val_records(settings: DataConfig) -> list[Record]:
    """The records of `data.val` in the same form; none if it is not set."""
    if settings.val is None:
        return []
    return _shortened(load_records(settings.val, settings.val_samples, settings.columns.names()), settings)


def _shortened(records: Sequence[Record], settings: DataConfig) -> list[Record]:
    return [_without_last_step(record, settings) for record in records] if settings.drop_last_step else list(records)


def _without_last_step(record: Record, settings: DataConfig) -> Record:
    try:
        return replace(record, reasoning=without_last_step(record.reasoning, settings.steps))
    except ValueError as error:
        raise FieldError(_FIELD, f"record '{record.id}': {error}; use data.steps 'lines'") from error
