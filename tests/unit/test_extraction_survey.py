"""Tests of the survey before an extraction: items, excluded samples and estimated size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from extraction.config import ExtractConfig
from extraction.dataset import Items
from extraction.pt_file import PTWriter
from extraction.survey import pt_bytes, stored_bytes, survey
from kvcore.errors import ConfigError, FieldError
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.store.kv_store import KVStoreWriter
from tests.support.kv_fakes import INFO, kv_of, samples
from tests.support.tiny_models import build_tokenizer

ROWS = [
    {"id": "a-cot", "prompt": "2+2? ", "reasoning": "It is 4. ", "answer": "4", "style": "cot", "dataset": "sums"},
    {"id": "a-direct", "prompt": "2+2? ", "reasoning": "", "answer": "4", "style": "direct", "dataset": "sums"},
    {"id": "b", "prompt": "二加二? ", "reasoning": "等于四。" * 9, "answer": "四", "task_type": "math"},
    {"id": "c", "prompt": "Why?", "reasoning": "", "answer": "So."},
]
TOKENIZER = build_tokenizer("qwen2")


def as_lines(directory: Path, rows: list[dict[str, Any]]) -> Path:
    path = directory / "data.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def config(**changes: Any) -> ExtractConfig:
    settings = {"teacher_models": ("t",), "student_model": "s", "dataset_path": Path("d"), "output_dir": Path("o")}
    return ExtractConfig(**{**settings, **changes})


def test_jsonl_and_saved_datasets_give_the_same_items(tmp_path: Path) -> None:
    keys = ("id", "prompt", "reasoning", "answer", "style", "dataset", "task_type")
    Dataset.from_list([{key: row.get(key, "") for key in keys} for row in ROWS]).save_to_disk(str(tmp_path / "saved"))
    lines, saved = Items(as_lines(tmp_path, ROWS)), Items(tmp_path / "saved")
    assert [lines[row] for row in range(4)] == [saved[row] for row in range(4)]
    assert [lines[row].style for row in range(4)] == ["cot", "direct", "cot", "direct"]
    assert [lines[row].record.dataset for row in range(4)] == ["sums", "sums", "", ""]
    assert lines[2].task_type == "math"
    assert len(Items(tmp_path / "saved", limit=3)) == 3


def test_missing_or_invalid_dataset_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such data file"):
        Items(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="save_to_disk"):
        Items(tmp_path)
    with pytest.raises(ConfigError, match="no record"):
        Items(as_lines(tmp_path, []))
    with pytest.raises(FieldError, match=r"data\.jsonl:2: answer"):
        Items(as_lines(tmp_path, [ROWS[0], {"id": "x", "prompt": "p", "reasoning": ""}]))[1]


def test_token_counts_per_part_equal_those_of_training(tmp_path: Path) -> None:
    found = survey(Items(as_lines(tmp_path, ROWS)), TOKENIZER, config())
    for row, tree in enumerate(ROWS):
        for column, part in enumerate(("prompt", "reasoning", "answer")):
            assert found.tokens_R3[row, column] == len(TOKENIZER(tree[part])["input_ids"])
    assert found.left_out == {}


def test_samples_over_max_length_are_left_out(tmp_path: Path) -> None:
    items = Items(as_lines(tmp_path, ROWS))
    longest = int(survey(items, TOKENIZER, config()).lengths().max()) + 1
    assert survey(items, TOKENIZER, config(max_length=longest)).left_out == {}
    left_out = survey(items, TOKENIZER, config(max_length=longest - 1)).left_out
    assert left_out == {2: f"longer than --max_length {longest - 1}"}


def test_samples_without_text_in_the_span_are_left_out(tmp_path: Path) -> None:
    found = survey(Items(as_lines(tmp_path, ROWS)), TOKENIZER, config(span="reasoning"))
    assert found.left_out == dict.fromkeys((1, 3), "no text in the span 'reasoning'")
    assert list(found.kept()) == [0, 2]


def test_dataset_without_usable_samples_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all 4 samples are left out"):
        survey(Items(as_lines(tmp_path, ROWS)), TOKENIZER, config(max_length=1))


def test_duplicate_id_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'a-cot' is already the id of row 1"):
        survey(Items(as_lines(tmp_path, [*ROWS, ROWS[0]])), TOKENIZER, config())


def test_digest_changes_with_text(tmp_path: Path) -> None:
    digests = set()
    for reasoning in ("It is 4. ", "It is 4."):
        items = Items(as_lines(tmp_path, [{**ROWS[0], "reasoning": reasoning}]))
        digests.add(survey(items, TOKENIZER, config()).digest)
    assert len(digests) == 2


@pytest.mark.parametrize("codec", ["raw", "bf16", "int8"])
def test_estimated_size_equals_written_size(tmp_path: Path, codec: Any) -> None:
    plan = KVPlan(
        layers=(0, 1, 2), selection=Selection(selector="right", budget=6, span="all"), codec=CodecSpec(name=codec)
    )
    sent = [kv_of(sample, plan=plan) for sample in samples(200)]
    with KVStoreWriter(tmp_path / "store", INFO, plan, "w") as store:
        for kv in sent:
            store.add(kv)
    estimate = sum(stored_bytes(kv.slots, kv.token_ids_T.numel(), plan, INFO) for kv in sent)
    written = sum(file.stat().st_size for file in (tmp_path / "store").iterdir())
    assert written == pytest.approx(estimate, rel=0.15)
    assert written < estimate

    dtype = torch.float32 if codec == "raw" else torch.bfloat16
    with PTWriter(tmp_path / "x.pt") as file:
        for kv in sent:
            x_LHMD = torch.zeros(3, INFO.kv_heads, kv.slots, INFO.head_dim, dtype=dtype)
            entry = {"teacher": "t", "keys": x_LHMD, "values": x_LHMD + 1, "positions": kv.positions.flatten()}
            file.append({"example_id": kv.sample_id, "teacher_kvs": [{**entry, "seq_len": 9}]})
    estimate = sum(pt_bytes(kv.slots, plan, INFO) for kv in sent)
    written = (tmp_path / "x.pt").stat().st_size
    assert written == pytest.approx(estimate, rel=0.2)
    assert written < estimate
