"""Tests of the multi-task data set: split sizes, shares, disjoint splits and the report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
from datasets import Dataset
from typer.testing import CliRunner

from data.multi_task_dataset import COLUMNS, MultiTaskReasoningDataset
from data.multi_task_dataset import prepare as prepare_command
from data.question_pool import question_key
from data.records import load_records
from kvcore.errors import ConfigError, FieldError
from tests.support.guide_data import write_guide_datasets
from tests.support.tiny_models import save_tiny_model, tiny_spec

EXTENDED = ["math", "arc_challenge", "hotpotqa"]
BASE = ["gsm8k", "svamp", "strategyqa"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("copies")
    write_guide_datasets(directory, 60)
    return directory


def prepare(copies: Path, **changes: Any) -> tuple[MultiTaskReasoningDataset, Dataset, Dataset]:
    settings: dict[str, Any] = {"train_samples": 200, "val_samples": 50, "data_dir": copies}
    loader = MultiTaskReasoningDataset(**settings | changes)
    return loader, *loader.load_and_prepare()


def question_of(row: dict[str, Any]) -> str:
    return question_key(row["prompt"].replace("Give only the result.", "").replace("只写结果。", ""))


def test_guide_example_reads_copies_from_environment_variable(
    copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVDISTILL_DATA_DIR", str(copies))
    loader = MultiTaskReasoningDataset(
        base_datasets=BASE,
        extended_datasets=EXTENDED,
        use_extended=True,
        math23k_ratio=0.2,
        train_samples=200,
        val_samples=50,
    )
    train_ds, val_ds = loader.load_and_prepare()
    train_ds.save_to_disk(tmp_path / "train")
    val_ds.save_to_disk(tmp_path / "val")
    assert (len(load_records(tmp_path / "train")), len(load_records(tmp_path / "val"))) == (200, 50)
    assert set(train_ds.column_names) == set(COLUMNS)
    assert set(train_ds["dataset"]) == set(val_ds["dataset"]) == {*BASE, *EXTENDED, "math23k"}


@pytest.mark.parametrize(("train", "val"), [(200, 50), (201, 51), (1, 1), (77, 30)])
def test_splits_have_exact_sizes_and_share_no_question(copies: Path, train: int, val: int) -> None:
    _, train_ds, val_ds = prepare(copies, train_samples=train, val_samples=val)
    assert (len(train_ds), len(val_ds)) == (train, val)
    ids = [*train_ds["id"], *val_ds["id"]]
    assert len(set(ids)) == len(ids)
    assert not {question_of(row) for row in train_ds.to_list()} & {question_of(row) for row in val_ds.to_list()}


def test_both_splits_have_the_chinese_share_and_equal_other_shares(copies: Path) -> None:
    loader, *splits = prepare(copies, math23k_ratio=0.2)
    for split, name in zip(splits, ("train", "val"), strict=True):
        counts = Counter(split["dataset"])
        assert counts["math23k"] == pytest.approx(0.2 * len(split), abs=2)
        assert Counter(split["language"])["zh"] == counts["math23k"]
        assert loader.report["splits"][name]["chinese_share"] == counts["math23k"] / len(split)
        others = [counts[name] for name in (*BASE, *EXTENDED)]
        assert max(others) - min(others) <= 2


def test_question_without_reasoning_has_only_style_direct(copies: Path) -> None:
    _, train_ds, _ = prepare(copies)
    styles: dict[str, set[str]] = {}
    for row in train_ds.to_list():
        styles.setdefault(row["id"].rpartition("-")[0], set()).add(row["style"])
        assert (row["style"] == "direct") == (row["reasoning"] == "")
    assert all(found == ({"direct"} if name.startswith("arc") else {"cot", "direct"}) for name, found in styles.items())


def test_single_style_can_be_requested(copies: Path) -> None:
    loader, train_ds, _ = prepare(copies, styles=["cot"])
    assert set(train_ds["style"]) == {"cot"}
    dropped = loader.report["datasets"]["arc_challenge"]["dropped"]
    assert dropped == {"no reasoning, and only style cot is requested": 60}


def test_rows_depend_on_seed(copies: Path) -> None:
    first, again, other = (prepare(copies, seed=seed)[1].to_list() for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert {row["id"] for row in first} != {row["id"] for row in other}


def test_weights_change_shares_and_small_dataset_is_reported(copies: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader, train_ds, val_ds = prepare(
        copies, use_extended=False, math23k_ratio=0, weights={"svamp": 3.0, "strategyqa": 0.0}, val_samples=20
    )
    counts = Counter([*train_ds["dataset"], *val_ds["dataset"]])
    assert counts == {"svamp": 120, "gsm8k": 100}
    assert loader.report["datasets"]["svamp"]["asked_share"] == 0.75
    assert "svamp has only 120 usable records: its share is 54.5 % instead of 75.0 %" in caplog.text


def test_too_few_records_raise_unless_allow_fewer(copies: Path) -> None:
    with pytest.raises(ConfigError, match=r"1000 training and 50 validation.*need 840 .*arc_challenge 60.*allow_fewer"):
        prepare(copies, train_samples=1000)
    with pytest.raises(ConfigError, match=r"Chinese share of 0.6 need 150 usable records, but there are: math23k 120"):
        prepare(copies, math23k_ratio=0.6)
    with pytest.raises(ConfigError, match="need 250 usable"):
        prepare(copies, use_extended=False, math23k_ratio=0, weights={"gsm8k": 0.0})
    loader, train_ds, val_ds = prepare(copies, train_samples=1000, allow_fewer=True)
    assert len(train_ds) + len(val_ds) == 5 * 120 + 60 + 120
    assert len(val_ds) == pytest.approx(len(train_ds) / 20, abs=2)
    assert loader.report["splits"]["train"]["records"] == len(train_ds)


def test_a_split_without_any_record_is_refused(copies: Path) -> None:
    with pytest.raises(ConfigError, match=r"val_samples: 1 were asked for, .*none is left for this split"):
        prepare(copies, train_samples=100_000, val_samples=1, allow_fewer=True)


def test_question_in_two_datasets_is_kept_once_and_reported(copies: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copies"
    paths = write_guide_datasets(directory, 30)
    row = json.loads(paths["svamp"].read_text(encoding="utf-8").splitlines()[4])
    copied = {"question": row["question_concat"].upper(), "answer": "7\n#### 7"}
    with paths["gsm8k"].open("a", encoding="utf-8") as file:
        file.write(json.dumps(copied) + "\n" + json.dumps(copied) + "\n")
    loader, *_ = prepare(directory, train_samples=100, val_samples=20)
    report = loader.report
    assert report["overlaps"] == {"gsm8k and svamp": 1}
    assert report["datasets"]["svamp"]["dropped"] == {"also in gsm8k": 1}
    assert report["datasets"]["gsm8k"]["dropped"] == {"repeated in this dataset": 1}
    assert report["datasets"]["gsm8k"]["rows"] == 32
    loader.write_report(tmp_path / "deep" / "report.json")
    assert json.loads((tmp_path / "deep" / "report.json").read_text(encoding="utf-8")) == report


def test_records_longer_than_max_tokens_are_dropped(copies: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "student", tiny_spec("qwen2"))
    loader, train_ds, _ = prepare(
        copies, tokenizer=tmp_path / "student", max_tokens=200, train_samples=20, val_samples=4, math23k_ratio=0
    )
    dropped = [found["dropped"].get("longer than max_tokens", 0) for found in loader.report["datasets"].values()]
    assert 0 < sum(dropped) < 6 * 60
    assert len(train_ds) == 20
    with pytest.raises(ConfigError, match=r"gsm8k 0 \(dropped: 60 longer than max_tokens\)"):
        prepare(copies, tokenizer=tmp_path / "student", max_tokens=9, math23k_ratio=0)


def test_write_report_before_load_and_prepare_raises(copies: Path, tmp_path: Path) -> None:
    loader = MultiTaskReasoningDataset(data_dir=copies)
    with pytest.raises(ConfigError, match="before load_and_prepare"):
        loader.write_report(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"base_datasets": ["gsm8"]}, "base_datasets: .*did you mean 'gsm8k'"),
        ({"extended_datasets": ["gsm8k"]}, "'gsm8k' is named twice"),
        ({"base_datasets": ["math23k"]}, "added by math23k_ratio"),
        ({"base_datasets": [], "use_extended": False}, "base_datasets: is empty"),
        ({"math23k_ratio": 1.5}, "1.5 is not from 0 to 1"),
        ({"train_samples": 0}, "train_samples: 0"),
        ({"val_samples": -1}, "val_samples: -1"),
        ({"styles": ["short"]}, "cot, direct"),
        ({"styles": []}, "cot, direct"),
        ({"weights": {"math23k": 1.0}}, "weights.math23k"),
        ({"weights": {"svamp": -1.0}}, "weights.svamp: -1.0"),
        ({"weights": {"svamp": float("nan")}}, "weights.svamp: nan"),
        ({"local_paths": {"svam": "x"}}, "did you mean 'svamp'"),
        ({"data_dir": "/nowhere/at/all"}, "is not a directory"),
    ],
)
def test_invalid_settings_are_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(FieldError, match=problem):
        MultiTaskReasoningDataset(**changes)


def test_missing_chinese_dataset_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'math23k'.*math23k.jsonl"):
        prepare(tmp_path)


def test_all_missing_datasets_are_named(copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "svamp.jsonl").write_text((copies / "svamp.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    loader = MultiTaskReasoningDataset(["gsm8k", "svamp", "strategyqa"], use_extended=False, data_dir=tmp_path)
    with pytest.raises(ConfigError) as caught:
        loader.load_and_prepare()
    first, *problems = str(caught.value).splitlines()
    assert first == "3 of 4 datasets cannot be read:"
    assert [problem.split("'")[1] for problem in problems] == ["math23k", "gsm8k", "strategyqa"]


def test_command_writes_both_splits_and_the_report(copies: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(prepare_command)
    flags = f"--output {tmp_path / 'out'} --data-dir {copies} --train-samples 40 --val-samples 10 --no-extended"
    result = CliRunner().invoke(app, [*flags.split(), "--base", "gsm8k"])
    assert result.exit_code == 0, result.output
    assert len(load_records(tmp_path / "out" / "train")) == 40
    assert set(json.loads((tmp_path / "out" / "report.json").read_text())["datasets"]) == {"gsm8k", "math23k"}


def test_command_makes_only_the_records_of_one_style(copies: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(prepare_command)
    flags = f"--output {tmp_path / 'out'} --data-dir {copies} --train-samples 40 --val-samples 10 --no-extended"
    aug = [*flags.split(), "--base", "gsm8k_aug", "--math23k-ratio", "0", "--allow-fewer", "--style"]
    result = CliRunner().invoke(app, [*aug, "cot"])
    assert result.exit_code == 0, result.output
    records = load_records(tmp_path / "out" / "train")
    assert len(records) == 40
    assert all(record.reasoning.startswith(" <<") and record.reasoning.endswith(">>\n####") for record in records)
    wrong = CliRunner().invoke(app, [*aug, "cat"])
    assert isinstance(wrong.exception, FieldError)
    assert "styles: ['cat'] must name one or both of cot, direct" in str(wrong.exception)
