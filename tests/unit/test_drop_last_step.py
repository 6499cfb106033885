"""Tests of `data.drop_last_step`: the text that is left of a reasoning, and the records of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.families import find_family
from data.prompts import record_of
from data.reasoning_steps import StepKind, steps_of, without_last_step
from data.records import Record, write_records
from kvcore.config import parse
from kvcore.errors import FieldError
from student_trainer.config import DataConfig
from student_trainer.loop.training_records import train_records, val_records
from tests.support.guide_data import MAKERS


@pytest.mark.parametrize(
    ("kind", "reasoning", "left"),
    [
        ("lines", " One.\nTwo.\nThree.\n####", " One.\nTwo.\n####"),
        ("lines", " One.\n\n  Two.\n\n#### ", " One.\n\n#### "),
        ("lines", "One.\r\nTwo.", "One."),
        ("lines", "一。\n二。\n####", "一。\n####"),
        ("lines", " Only one.\n####", " Only one.\n####"),
        ("lines", "", ""),
        ("equations", " <<1+2=3>> <<3*2=6>> <<6-1=5>>\n####", " <<1+2=3>> <<3*2=6>>\n####"),
        ("equations", "<<1+2=3>><<3*2=6>>", "<<1+2=3>>"),
        ("equations", "So <<1+2=3>>\n<<3*2=6>> #### ", "So <<1+2=3>> #### "),
        ("equations", " <<1+2=3>>\n####", " <<1+2=3>>\n####"),
        ("equations", " no equation\nat all", " no equation\nat all"),
    ],
)
def test_the_last_step_and_its_separator_are_left_out(kind: StepKind, reasoning: str, left: str) -> None:
    assert without_last_step(reasoning, kind) == left
    steps = steps_of(reasoning, kind)
    assert steps_of(left, kind) == (steps[:-1] if len(steps) > 1 else steps)


@pytest.mark.parametrize(
    "reasoning", ["Half is <<48/2=24>>24.\nTogether <<48+24=72>>72.", "<<1+2=3>> so <<3*2=6>>", "<<1=1>> <<2=2>> end"]
)
def test_equations_within_text_are_refused(reasoning: str) -> None:
    with pytest.raises(ValueError, match="there is text around its last equation, '<<"):
        without_last_step(reasoning, "equations")


@pytest.mark.parametrize(("name", "kind"), [("gsm8k_aug", "equations"), ("gsm8k_aug_nl", "lines"), ("gsm8k", "lines")])
def test_the_mark_before_the_answer_is_no_step(name: str, kind: StepKind) -> None:
    family = find_family(name)
    question = family.parse(MAKERS[name](0))
    reasoning = record_of(question, "cot", "en", "a").reasoning
    first, last = steps_of(reasoning, kind)
    left = without_last_step(reasoning, kind)
    assert steps_of(left, kind) == [first]
    assert last not in left
    assert left.endswith("\n####")


RECORDS = [
    Record("a", "Add.", " <<1+2=3>> <<3*2=6>>\n####", " 6"),
    Record("b", "Take.", " <<4-1=3>>\n####", " 3", dataset="d"),
]


def settings(directory: Path, records: list[Record], **changes: Any) -> DataConfig:
    for split in ("train", "val"):
        write_records(directory / f"{split}.jsonl", records)
    tree = {"train": str(directory / "train.jsonl"), "val": str(directory / "val.jsonl"), "steps": "equations"}
    return parse(tree | changes, DataConfig)


def test_training_and_validation_records_change_in_their_reasoning_alone(tmp_path: Path) -> None:
    short = Record("a", "Add.", " <<1+2=3>>\n####", " 6")
    dropped = settings(tmp_path, RECORDS, drop_last_step=True)
    assert train_records(dropped) == val_records(dropped) == [short, RECORDS[1]]
    whole = settings(tmp_path, RECORDS)
    assert train_records(whole) == val_records(whole) == RECORDS
    assert val_records(settings(tmp_path, RECORDS, drop_last_step=True, val_samples=1)) == [short]
    assert val_records(settings(tmp_path, RECORDS, drop_last_step=True, val=None)) == []


def test_data_without_a_step_to_leave_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=r"data\.drop_last_step: none of the 2 training samples .* is 'lines'"):
        train_records(settings(tmp_path, RECORDS, drop_last_step=True, steps="lines"))
    text = Record("c", "Add.", " So <<1+2=3>>, then <<3*2=6>>.", " 6")
    with pytest.raises(
        FieldError, match=r"data\.drop_last_step: record 'c': there is text .*; use data\.steps 'lines'"
    ):
        train_records(settings(tmp_path, [*RECORDS, text], drop_last_step=True))
