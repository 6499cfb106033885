"""Tests of the recipe's training data: the guide's mix of datasets, or a directory of records."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.records import Record, load_records, write_records
from experiments.recipe.config import RecipeSettings
from experiments.recipe.prepare import prepare_data
from kvcore.errors import ConfigError
from tests.support.guide_data import write_guide_datasets
from tests.support.tiny_models import save_tiny_model, tiny_spec


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("student"), tiny_spec("qwen2", layers=1))


def settings(student: Path, **changes: Any) -> RecipeSettings:
    given = {
        "student_model_name_or_path": str(student),
        "teacher_models": ("a",),
        "output_dir": Path("out"),
        "train_samples": 40,
        "val_samples": 10,
    }
    return RecipeSettings(**{**given, **changes})


def test_guides_mix_has_reasoning_in_latent_mode(student: Path, tmp_path: Path) -> None:
    write_guide_datasets(tmp_path / "copies", 40)
    files = prepare_data(settings(student, data_dir=tmp_path / "copies"), tmp_path / "latent")
    train, val = load_records(files.train), load_records(files.val)
    assert (len(train), len(val)) == (40, 10)
    assert all(record.reasoning for record in (*train, *val))
    counts = Counter(record.dataset for record in train)
    assert counts["math23k"] == 8
    assert counts.keys() == {"gsm8k", "svamp", "strategyqa", "math", "hotpotqa", "math23k"}
    assert not {record.prompt for record in train} & {record.prompt for record in val}

    whole = settings(student, data_dir=tmp_path / "copies", student_mode="token", kv_compression="full")
    files = prepare_data(whole, tmp_path / "token")
    both = load_records(files.train)
    assert {bool(record.reasoning) for record in both} == {True, False}
    assert "arc_challenge" in {record.dataset for record in both}


def test_named_datasets_replace_the_guides_mix(student: Path, tmp_path: Path) -> None:
    write_guide_datasets(tmp_path / "copies", 40)
    named = settings(student, data_dir=tmp_path / "copies", dataset_name=("gsm8k", "math23k"), math23k_ratio=0.5)
    counts = Counter(record.dataset for record in load_records(prepare_data(named, tmp_path / "data").train))
    assert counts == {"gsm8k": 20, "math23k": 20}


def test_directory_is_prepared_once(student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_reasoning = [Record(f"a{number}", f"Q{number}?", " because", " 1", "one") for number in range(5)]
    write_records(tmp_path / "train.jsonl", [*with_reasoning, Record("b", "Q?", "", " 1", "two")])
    write_records(tmp_path / "val.jsonl", with_reasoning[:2])
    chosen = settings(student, dataset_name=(str(tmp_path),), train_samples=None)
    with caplog.at_level(logging.INFO):
        files = prepare_data(chosen, tmp_path / "out")
    assert load_records(files.train) == with_reasoning
    assert "omitted train records without reasoning: 1 of two" in caplog.text
    before = files.train.stat().st_mtime_ns
    prepare_data(chosen, tmp_path / "out")
    assert files.train.stat().st_mtime_ns == before
    prepare_data(chosen.model_copy(update={"train_samples": 3}), tmp_path / "out")
    assert len(load_records(files.train)) == 3


def test_changed_directory_is_prepared_again(student: Path, tmp_path: Path) -> None:
    for answer in (" 1", " 2"):
        records = [Record("a", "Q?", " because", answer)]
        write_records(tmp_path / "train.jsonl", records)
        write_records(tmp_path / "val.jsonl", records)
        files = prepare_data(settings(student, dataset_name=(str(tmp_path),)), tmp_path / "out")
        assert load_records(files.train) == records


def test_too_long_records_of_a_directory_are_omitted_and_counted(
    student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long, short = Record("a", "Q?" * 30, " because", " 1"), Record("b", "Q?", " because", " 1")
    write_records(tmp_path / "train.jsonl", [long, short])
    write_records(tmp_path / "val.jsonl", [short])
    with caplog.at_level(logging.INFO):
        files = prepare_data(settings(student, dataset_name=(str(tmp_path),), max_length=40), tmp_path / "out")
    assert load_records(files.train) == [short]
    assert "omitted 1 train records longer than --max_length 40" in caplog.text


def test_directory_gives_the_requested_number_of_usable_records(
    student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = [Record(f"a{number}", f"Q{number}?", " because", " 1") for number in range(4)]
    unusable = [Record("b", "Q?", "", " 1"), Record("c", "Q?" * 30, " because", " 1")]
    write_records(tmp_path / "train.jsonl", [*unusable, *short])
    write_records(tmp_path / "val.jsonl", short[:1])
    chosen = settings(student, dataset_name=(str(tmp_path),), max_length=40, train_samples=3, val_samples=2)
    files = prepare_data(chosen, tmp_path / "out")
    assert load_records(files.train) == short[:3]
    assert "found only 1 of the requested 2 val records" in caplog.text
    with pytest.raises(ConfigError, match=r"--max_length: every train record is longer than 5 tokens"):
        prepare_data(chosen.model_copy(update={"max_length": 5}), tmp_path / "out")


@pytest.mark.parametrize("names", [("gsm8k",), ("{directory}",)])
def test_missing_student_raises_before_data_are_prepared(names: tuple[str, ...], tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_records(tmp_path / f"{split}.jsonl", [Record("a", "Q?", " because", " 1")])
    names = tuple(name.format(directory=tmp_path) for name in names)
    with pytest.raises(ConfigError, match=r"student.path: cannot load 'no/such-student'"):
        prepare_data(settings(Path("no/such-student"), dataset_name=names, data_dir=tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("./no/such",), "there is no directory './no/such'"),
        (("gsm8k", "multi_reasoning_cot_direct"), "is already a mix"),
        (("gsm9k",), "gsm9k"),
    ],
)
def test_missing_dataset_raises_with_its_name(
    student: Path, tmp_path: Path, names: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        prepare_data(settings(student, dataset_name=names, data_dir=tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
