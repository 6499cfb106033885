"""Tests of reading and writing records, and of the epoch order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from data.records import Record, content_digest, epoch_order, load_records, write_records
from kvcore.errors import ConfigError, FieldError

GOOD = {"id": "a", "prompt": "1 +1 =", "reasoning": " 2", "answer": " 2"}


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_records_of_any_script_round_trip(tmp_path: Path) -> None:
    records = [
        Record("a", "2 +3 =", " 5", " 5"),
        Record("b", "问题\n第二行", "", " 🙂\u2028é", dataset="math23k"),
        Record("c", 'quote " and \\ and tab\t', "\r\n", "x"),
    ]
    write_records(tmp_path / "deep" / "r.jsonl", records)
    assert load_records(tmp_path / "deep" / "r.jsonl") == records


def test_limit_reads_only_the_first_records(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", json.dumps(GOOD), json.dumps({**GOOD, "id": "b"}), "this is not read")
    assert [record.id for record in load_records(path, limit=2)] == ["a", "b"]


def test_blank_lines_and_extra_keys_are_ignored(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", "", json.dumps({**GOOD, "source": 7}), "   ")
    assert load_records(path) == [Record(**GOOD)]


@pytest.mark.parametrize(
    ("line", "field", "problem"),
    [
        ("{", "", "not valid JSON"),
        ("[1]", "", "found list"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "reasoning"}), "reasoning", "missing"),
        (json.dumps({**GOOD, "answer": 3}), "answer", "found int (3)"),
        (json.dumps({**GOOD, "prompt": ""}), "prompt", "empty"),
        (json.dumps({**GOOD, "dataset": None}), "dataset", "found NoneType"),
        (json.dumps({**GOOD, "answer": "\ud800"}), "answer", "surrogate"),
        (json.dumps({**GOOD, "id": "first"}), "id", "line 1"),
    ],
)
def test_invalid_record_raises_with_file_line_and_field(tmp_path: Path, line: str, field: str, problem: str) -> None:
    path = write_lines(tmp_path / "bad.jsonl", json.dumps({**GOOD, "id": "first"}), line)
    with pytest.raises(FieldError) as caught:
        load_records(path)
    assert f"{path}:2" in caught.value.field
    assert caught.value.field.endswith(field)
    assert problem in caught.value.problem


def test_invalid_utf8_raises_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xe9"}\n')
    with pytest.raises(FieldError, match=r"latin\.jsonl:2: not valid UTF-8"):
        load_records(path)


def test_missing_or_empty_file_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such data file or directory"):
        load_records(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="has no records"):
        load_records(write_lines(tmp_path / "empty.jsonl", ""))


def test_saved_dataset_is_read_and_extra_columns_are_ignored(tmp_path: Path) -> None:
    rows = [GOOD | {"style": "cot"}, {**GOOD, "id": "b", "reasoning": "", "style": "direct"}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert load_records(tmp_path / "saved") == [Record(**GOOD), Record("b", GOOD["prompt"], "", GOOD["answer"])]
    assert [record.id for record in load_records(tmp_path / "saved", limit=1)] == ["a"]


def test_digest_depends_only_on_content(tmp_path: Path) -> None:
    for name, row in (("one", GOOD), ("same", GOOD), ("other", GOOD | {"answer": "9"})):
        write_lines(tmp_path / f"{name}.jsonl", json.dumps(row))
        Dataset.from_list([row]).save_to_disk(tmp_path / name)
        state = tmp_path / name / "state.json"
        state.write_text(state.read_text(encoding="utf-8") + " " * len(name), encoding="utf-8")
    for suffix in ("", ".jsonl"):
        one, same, other = (content_digest(tmp_path / f"{name}{suffix}") for name in ("one", "same", "other"))
        assert one == same != other
    with pytest.raises(ConfigError, match="no such data file or directory"):
        content_digest(tmp_path / "none")


@pytest.mark.parametrize(
    ("row", "field", "problem"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"answer": None}, "answer", "found NoneType"),
        ({}, "id", "already the id of row 1"),
    ],
)
def test_invalid_row_of_a_saved_dataset_raises_with_row_and_field(
    tmp_path: Path, row: dict[str, Any], field: str, problem: str
) -> None:
    Dataset.from_list([GOOD, GOOD | row]).save_to_disk(tmp_path / "saved")
    with pytest.raises(FieldError, match=rf"saved:2: {field}.*{problem}"):
        load_records(tmp_path / "saved")


def test_directory_without_one_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_to_disk"):
        load_records(tmp_path)
    DatasetDict({"train": Dataset.from_list([GOOD])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ConfigError, match="has the splits train"):
        load_records(tmp_path / "splits")
    assert load_records(tmp_path / "splits" / "train") == [Record(**GOOD)]


def test_damaged_saved_dataset_raises(tmp_path: Path) -> None:
    Dataset.from_list([GOOD]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"not arrow")
    with pytest.raises(ConfigError, match="cannot read"):
        load_records(tmp_path / "saved")


@given(prompt=st.text(min_size=1), reasoning=st.text(), answer=st.text(min_size=1))
def test_spans_cover_prompt_reasoning_and_answer(prompt: str, reasoning: str, answer: str) -> None:
    sample = Record("x", prompt, reasoning, answer).sample()
    assert sample.text is not None
    cut = {span.kind: sample.text[span.start : span.end] for span in sample.spans}
    expected = {"prompt": prompt, "reasoning": reasoning, "answer": answer}
    assert cut == {kind: part for kind, part in expected.items() if part}


def test_epoch_order_is_a_permutation_by_seed_and_epoch() -> None:
    order = epoch_order(1000, seed=3, epoch=5)
    assert sorted(order) == list(range(1000))
    assert order == epoch_order(1000, seed=3, epoch=5)
    others = [epoch_order(1000, 3, 6), epoch_order(1000, 5, 3), epoch_order(1000, 4, 5), list(range(1000))]
    assert order not in others
    assert sorted(epoch_order(10, seed=-1, epoch=0)) == list(range(10))


def test_epoch_order_is_the_same_in_every_process() -> None:
    assert epoch_order(8, seed=0, epoch=0) == [2, 4, 3, 6, 5, 0, 1, 7]
