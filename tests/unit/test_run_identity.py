"""Tests of the settings that must stay the same when a run resumes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from data.records import write_records
from student_trainer.loop.run_identity import differences, run_identity
from tests.support.training_parts import RECORDS, train_config


@pytest.fixture
def identity(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "train.jsonl"
    write_records(path, RECORDS)
    return run_identity(train_config(data={"train": str(path)}), len(RECORDS), {})


@pytest.mark.parametrize(
    ("section", "setting", "default", "other"),
    [
        ("align", "map_at", "trainer", "teacher"),
        ("loss", "step_ce_weight", 0.0, 0.5),
        ("loss", "kv_scale", "layer", "none"),
        ("loss", "step_ce_passes", "last", "all"),
        ("student", "projection", True, False),
        ("data", "steps", "lines", "equations"),
        ("data", "drop_last_step", False, True),
        ("run", "curriculum_epochs", None, 1.0),
    ],
)
def test_a_setting_that_did_not_exist_yet_had_its_default(
    identity: dict[str, Any], section: str, setting: str, default: object, other: object
) -> None:
    assert identity[section][setting] == default
    then, now = copy.deepcopy(identity), copy.deepcopy(identity)
    del then[section][setting]
    assert differences(then, now) == []
    now[section][setting] = other
    assert differences(then, now) == [f"{section}.{setting}: {default!r} then, {other!r} now"]
