"""Tests of dataset copies: every format gives the same rows, and errors say how to provide a copy."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from data.dataset_sources import Source, find_source, read_rows
from data.families import find_family
from data.local_copies import stream_copy
from kvcore.errors import ConfigError, FieldError
from tests.support.guide_data import MAKERS

COUNT = 6
README = """---
configs:
- config_name: {0}
  data_files:
  - split: train
    path: {0}/train-*
  - split: test
    path: {0}/test-*
---
"""


def made(name: str, count: int = COUNT) -> list[dict[str, Any]]:
    return [MAKERS[name](index) for index in range(count)]


def lines(path: Path, rows: list[dict[str, Any]], **style: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False, **style) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(path)
    return path


def saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    Dataset.from_list(rows).save_to_disk(path)
    return path


def saved_splits(path: Path, rows: list[dict[str, Any]]) -> Path:
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}).save_to_disk(path)
    return path


def split_files(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines(path / "train.jsonl", rows)
    lines(path / "test.jsonl", rows[:1])
    return path


def like_the_hub(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet(path / "main" / "train-00000-of-00001.parquet", rows)
    parquet(path / "main" / "test-00000-of-00001.parquet", rows[:1])
    (path / "README.md").write_text(README.format("main"), encoding="utf-8")
    return path


def array(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("copy.jsonl", lines),
        ("copy.json", lines),
        ("copy.json", array),
        ("copy.parquet", parquet),
        ("saved", saved),
        ("splits", saved_splits),
        ("files", split_files),
        ("repository", like_the_hub),
    ],
)
def test_every_copy_format_gives_the_training_rows(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], Path]
) -> None:
    path = write(tmp_path / name, made("gsm8k"))
    assert [dict(row) for row in read_rows(Source(find_family("gsm8k"), path), 0, 99)] == made("gsm8k")


def test_nested_columns_are_kept(tmp_path: Path) -> None:
    paths = {
        "arc_challenge": parquet(tmp_path / "arc.parquet", made("arc_challenge")),
        "hotpotqa": lines(tmp_path / "hotpotqa.jsonl", made("hotpotqa")),
    }
    for name, path in paths.items():
        assert sorted(map(str, read_rows(Source(find_family(name), path), 0, 99))) == sorted(map(str, made(name)))


def test_math23k_is_read_in_its_original_format(tmp_path: Path) -> None:
    """The file holds consecutive JSON objects of several lines each, in its own directory."""
    lines(tmp_path / "math23k" / "math23k.json", made("math23k"), indent=2)
    source = find_source(find_family("math23k"), {}, tmp_path)
    assert list(read_rows(source, 0, 99)) == made("math23k")


def test_notes_beside_the_only_json_file_of_a_directory_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text("Use it.\n", encoding="utf-8")
    # As in Math23K, consecutive objects with numbers and text, which the datasets library does not read.
    (tmp_path / "all.json").write_text('{"a":\n1}\n{"a":\n"2%"}', encoding="utf-8")
    (streamed,) = stream_copy(tmp_path, "train")
    assert list(streamed) == [{"a": 1}, {"a": "2%"}]
    (tmp_path / "train.txt").write_text("Who?||<<1+2=3>> #### 3\n", encoding="utf-8")
    (streamed,) = stream_copy(tmp_path, "train")
    assert list(streamed) == [{"question": "Who?", "steps": "<<1+2=3>> ", "answer": " 3"}]


def test_text_lines_of_gsm8k_aug_give_its_columns(tmp_path: Path) -> None:
    lines = ["Who\u2028?||<<1+2=3>> <<3*2=6>> #### 6", "", "Why||or||why?||<<2-1=1>> #### 1"]
    (tmp_path / "gsm8k_aug.txt").write_bytes("\r\n".join(lines).encode())
    source = find_source(find_family("gsm8k_aug"), {}, tmp_path)
    found = [source.family.parse(row) for row in read_rows(source, 0, 99)]
    assert [(each.stem, each.reasoning, each.answer) for each in found] == [
        ("Who\u2028?", "<<1+2=3>> <<3*2=6>>", "6"),
        ("Why||or||why?", "<<2-1=1>>", "1"),
    ]
    (tmp_path / "gsm8k_aug.txt").write_text("Who?||<<1+2=3>> #### 3\nWho? <<1+2=3>> #### 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"gsm8k_aug.txt:2: expected 'question\|\|steps #### answer', found 'Who"):
        _consume(read_rows(source, 0, 99))


@pytest.mark.parametrize(("split", "count", "without_steps"), [("valid", 500, 6), ("test", 1319, 18)])
def test_true_files_of_gsm8k_aug_are_read_completely(split: str, count: int, without_steps: int) -> None:
    source = Source(find_family("gsm8k_aug"), true_file(f"gsm8k_aug_{split}.txt"))
    rows = list(read_rows(source, 0, 9999))
    assert len(rows) == count
    found = [source.family.parse(row) for row in rows if row["steps"].strip()]
    assert len(found) == count - without_steps
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", each.answer) for each in found)
    assert all(re.fullmatch(r"<<[^<>]+>>( <<[^<>]+>>)*", each.reasoning) for each in found)


def true_file(name: str) -> Path:
    """A copy of public data; skips the test without it."""
    for folder in (os.environ.get("KVDISTILL_DATA_DIR"), Path(__file__).resolve().parents[3] / "shared" / "data"):
        if folder and (Path(folder) / name).is_file():
            return Path(folder) / name
    pytest.skip(f"no {name}: set KVDISTILL_DATA_DIR to a directory that has it")


def test_all_configurations_of_a_hub_clone_are_read(tmp_path: Path) -> None:
    family = find_family("math")
    names = [f"- config_name: {name}\n  data_files: {name}/train-*\n" for name in family.configs]
    for index, name in enumerate(family.configs):
        parquet(tmp_path / name / "train-00000-of-00001.parquet", [MAKERS["math"](index)])
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(names) + "---\n", encoding="utf-8")
    assert list(read_rows(Source(family, tmp_path), 0, 99)) == made("math", len(family.configs))


def test_large_dataset_is_sampled_by_seed(tmp_path: Path) -> None:
    source = Source(find_family("hotpotqa"), lines(tmp_path / "hotpotqa.jsonl", made("hotpotqa", 40)))

    def ids(seed: int) -> list[str]:
        return [row["id"] for row in read_rows(source, seed, 10)]

    assert len(set(ids(1))) == 10
    assert ids(1) == ids(1) != ids(2)


def test_local_path_precedes_data_dir_which_precedes_hub(tmp_path: Path) -> None:
    family = find_family("gsm8k")
    assert find_source(family, {}, tmp_path) == Source(family, None)
    assert "openai/gsm8k (main)" in str(find_source(family, {}, None))
    inside = lines(tmp_path / "gsm8k.jsonl", made("gsm8k"))
    assert find_source(family, {}, tmp_path).path == inside
    named = lines(tmp_path / "elsewhere.jsonl", made("gsm8k"))
    assert find_source(family, {"gsm8k": str(named)}, tmp_path).path == named
    inside.with_suffix(".parquet").touch()
    with pytest.raises(FieldError, match=r"name one of .*gsm8k.jsonl.*gsm8k.parquet"):
        find_source(family, {}, tmp_path)


def test_missing_dataset_error_says_how_to_provide_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'math23k'.*local_paths=\{'math23k': PATH\}.*KVDISTILL_DATA_DIR"):
        find_source(find_family("math23k"), {}, tmp_path)
    with pytest.raises(FieldError, match=r"local_paths.gsm8k: there is no"):
        find_source(find_family("gsm8k"), {"gsm8k": tmp_path / "none"}, None)


def test_unreachable_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'gsm8k' cannot be read from hub: openai/gsm8k.*reach.*local_paths"):
        list(read_rows(Source(find_family("gsm8k"), None), 0, 99))


def no_training_split(path: Path) -> Path:
    lines(path / "test.jsonl", made("gsm8k"))
    return path


def other_configuration(path: Path) -> Path:
    like_the_hub(path, made("gsm8k"))
    (path / "main").rename(path / "socratic")
    (path / "README.md").write_text(README.format("socratic"), encoding="utf-8")
    return path


def other_suffix(path: Path) -> Path:
    return lines(path.with_suffix(".csv"), made("gsm8k"))


def broken(path: Path) -> Path:
    path = lines(path.with_suffix(".jsonl"), made("gsm8k"))
    path.write_text(path.read_text(encoding="utf-8") + "{nonsense\n", encoding="utf-8")
    return path


def broken_objects(path: Path) -> Path:
    return broken(path).rename(path.with_suffix(".json"))


def no_objects(path: Path) -> Path:
    path = path.with_suffix(".json")
    path.write_text("[1, 2]", encoding="utf-8")
    return path


def no_parquet(path: Path) -> Path:
    path = path.with_suffix(".parquet")
    path.write_text("no parquet", encoding="utf-8")
    return path


def nothing(path: Path) -> Path:
    path.mkdir()
    return path


def other_columns(path: Path) -> Path:
    return lines(path.with_suffix(".jsonl"), [{"question": "Why?", "text": "Because."}])


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (no_training_split, "train"),
        (other_configuration, "has the configurations socratic, not main"),
        (other_suffix, "expected a file that ends in"),
        (broken, "JSON"),
        (broken_objects, "Expecting property name"),
        (no_objects, "expected JSON objects, found int"),
        (no_parquet, "Parquet"),
        (nothing, "data files"),
        (other_columns, "row 1 has no column answer; it has question, text"),
    ],
)
def test_unreadable_copy_raises_config_error(tmp_path: Path, write: Callable[[Path], Path], problem: str) -> None:
    path = write(tmp_path / "copy")
    with pytest.raises(ConfigError, match=problem):
        _consume(read_rows(Source(find_family("gsm8k"), path), 0, 99))


def _consume(rows: Iterator[Any]) -> None:
    for _ in rows:
        pass
