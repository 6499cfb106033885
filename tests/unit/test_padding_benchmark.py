"""Tests of the benchmark of padding, and of the padding of a real dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import padding
from data.records import Record, write_records
from tests.support.servers import REPOSITORY
from tests.support.tiny_models import build_tokenizer

GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k.jsonl"


def measured(data: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict:
    build_tokenizer("qwen2").save_pretrained(str(directory / "student"))
    arguments = ["padding", "--data", str(data), "--tokenizer", str(directory / "student")]
    monkeypatch.setattr("sys.argv", arguments)
    padding.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_shares_are_measured_for_both_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Lengths 1 to 64, each four times: sorted in rounds of 8 on one rank, a length and its successor share a round.
    records = [Record(str(at), "x" * (1 + at % 64), "", "1") for at in range(256)]
    write_records(tmp_path / "own.jsonl", records)
    found = measured(tmp_path / "own.jsonl", tmp_path, monkeypatch, capsys)
    assert (found["records"], found["micro_batch"]) == (256, 8)
    random, ordered = found["padding_share"]["random"], found["padding_share"]["sorted"]
    assert set(random) == set(ordered) == {"ranks1", "ranks2", "ranks8"}
    assert min(random.values()) > 0.3
    assert max(ordered.values()) < 0.03


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"needs GSM8K as {GSM8K}")
def test_sorted_micro_batches_of_gsm8k_are_at_most_a_twentieth_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(GSM8K, tmp_path, monkeypatch, capsys)
    assert found["records"] == 7473
    assert min(found["padding_share"]["random"].values()) > 0.3
    assert max(found["padding_share"]["sorted"].values()) <= 0.05
