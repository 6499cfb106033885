"""Tests of reading and writing records, and of the epoch order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from data.records import Record, content_digest, epoch_order, load_records, write_records
from kvcore.errors import ConfigError, FieldError

GOOD: dict[str, Any] = {"id": "a", "prompt": "1 +1 =", "reasoning": " 2", "answer": " 2"}


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


OWN: dict[str, Any] = {"question": "1 +1 =", "rationale": " 2", "label": " 2", "source": 7}
COLUMNS = {"prompt": "question", "reasoning": "rationale", "answer": "label"}


def test_own_columns_are_read_from_lines_and_saved_datasets(tmp_path: Path) -> None:
    write_lines(tmp_path / "own.jsonl", "", json.dumps(OWN), json.dumps({**OWN, "label": " 3"}))
    Dataset.from_list([OWN, {**OWN, "label": " 3"}]).save_to_disk(tmp_path / "saved")
    expected = [Record("", "1 +1 =", " 2", " 2"), Record("", "1 +1 =", " 2", " 3")]
    for name, ids in (("own.jsonl", ["own.jsonl:2", "own.jsonl:3"]), ("saved", ["saved:1", "saved:2"])):
        found = load_records(tmp_path / name, columns=COLUMNS)
        assert found == [replace(record, id=given) for record, given in zip(expected, ids, strict=True)]


def test_own_ids_and_datasets_are_kept(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "own.jsonl", json.dumps({**GOOD, "name": "x", "origin": "svamp"}))
    assert load_records(path) == [Record(**GOOD)]
    assert load_records(path, columns={"id": "name", "dataset": "origin"}) == [
        Record(**{**GOOD, "id": "x"}, dataset="svamp")
    ]


def test_file_without_reasoning_is_read(tmp_path: Path) -> None:
    bare = {name: text for name, text in GOOD.items() if name != "reasoning"}
    path = write_lines(tmp_path / "bare.jsonl", json.dumps(bare), json.dumps({**bare, "id": "b"}))
    assert [record.reasoning for record in load_records(path)] == ["", ""]
    write_lines(path, json.dumps(bare), json.dumps({**GOOD, "id": "b"}))
    with pytest.raises(FieldError, match=r"bare\.jsonl:2: reasoning: all records need the same columns"):
        load_records(path)


def test_unknown_column_lists_those_found_and_the_nearest(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "own.jsonl", json.dumps(OWN))
    with pytest.raises(
        FieldError, match=r"data\.columns\.answer: .*own\.jsonl:1 has no column 'lable'; it has"
    ) as caught:
        load_records(path, columns={**COLUMNS, "answer": "lable"})
    assert caught.value.problem.endswith("the columns question, rationale, label, source; did you mean 'label'?")
    with pytest.raises(FieldError, match=r"own\.jsonl:1: answer: missing.*question, .* data\.columns\.answer sets"):
        load_records(path, columns={"prompt": "question"})
    with pytest.raises(FieldError, match=r"own\.jsonl:1: id: missing"):
        load_records(path)


def test_value_of_an_own_column_is_checked(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "own.jsonl", json.dumps({**OWN, "label": 2}))
    with pytest.raises(FieldError, match=r"own\.jsonl:1: label: expected a string, found int \(2\)"):
        load_records(path, columns=COLUMNS)


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 +1?"},
    {"role": "assistant", "content": " 2 é"},
    {"role": "user", "content": "2 +2?"},
]


def test_conversation_is_read_written_and_kept_as_turns(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", json.dumps({**GOOD, "prompt": MESSAGES}))
    Dataset.from_list([{**GOOD, "prompt": MESSAGES}]).save_to_disk(tmp_path / "saved")
    (record,) = load_records(path)
    assert record.prompt == "Be brief.\n1 +1?\n 2 é\n2 +2?"
    assert record.turns == tuple((message["role"], message["content"]) for message in MESSAGES)
    assert load_records(tmp_path / "saved") == [record]
    write_records(tmp_path / "again.jsonl", [record])
    assert load_records(tmp_path / "again.jsonl") == [record]
    assert len({record, *load_records(path)}) == 1, "records have a hash"
    contents = [(turn.role, record.text[turn.start : turn.end]) for turn in record.chat("ignored").turns]
    assert contents == list(record.turns)
    assert record.chat("ignored").system_prompt == ""


@pytest.mark.parametrize(
    ("messages", "field", "problem"),
    [
        ([], "prompt", "last message must have the role 'user'"),
        (MESSAGES[:3], "prompt", "last message must have the role 'user'"),
        ([MESSAGES[1], MESSAGES[0], MESSAGES[1]], "prompt.1.role", "must be the first"),
        ([{"role": "tool", "content": "x"}], "prompt.0.role", "expected one of system, user, assistant; got 'tool'"),
        ([{"role": "user"}], "prompt.0.content", "found NoneType"),
        ([{"role": "user", "content": ""}], "prompt.0.content", "must not be empty"),
        (["hi"], "prompt.0", "expected an object with role and content, found str"),
    ],
)
def test_invalid_conversation_raises_with_its_message(
    tmp_path: Path, messages: list[Any], field: str, problem: str
) -> None:
    path = write_lines(tmp_path / "bad.jsonl", json.dumps({**GOOD, "prompt": messages}))
    with pytest.raises(FieldError) as caught:
        load_records(path)
    assert caught.value.field == f"{path}:1: {field}"
    assert problem in caught.value.problem


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    write_records(path, [Record("a", "Q?", " R", " A"), Record("b", "Q?", " R", " B")])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [record.id for record in load_records(path)] == ["a", "b"]


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


def test_saved_dataset_without_rows_raises(tmp_path: Path) -> None:
    Dataset.from_dict({"prompt": []}).save_to_disk(str(tmp_path / "val"))
    with pytest.raises(ConfigError, match=r"val: has no records"):
        load_records(tmp_path / "val")


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
