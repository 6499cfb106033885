"""Tests of extraction with real teacher servers: the written K/V are those of the models, also after interruptions."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from extraction import command, finish
from extraction import extract as run
from kvcore.errors import EXIT_FAILED, EXIT_USAGE
from kvcore.store.kv_store import KVStoreReader
from tests.support.extraction import ExtractionWorld, assert_same_kv, load_pt, make_world
from tests.support.reference_kv import load_reference, reference_kv
from tests.support.servers import REPOSITORY, TeacherProcess, running_teacher, wait_until

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ExtractionWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def servers(world: ExtractionWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, TeacherProcess]]:
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                running_teacher(path, logs / f"{name}.log", name=name, device="cpu", dtype="fp32", threads=1)
            )
            for name, path in world.teachers.items()
        }


@pytest.fixture(scope="module")
def endpoints(servers: dict[str, TeacherProcess]) -> list[str]:
    return [f"{name}={server.endpoint}" for name, server in servers.items()]


@pytest.fixture(autouse=True)
def restored_process() -> Iterator[None]:
    """Restore the log handlers and the SIGTERM handler, because the command changes them in the test process."""
    handlers, level = logging.root.handlers[:], logging.root.level
    on_sigterm = signal.getsignal(signal.SIGTERM)
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    signal.signal(signal.SIGTERM, on_sigterm)


@pytest.fixture
def extract(world: ExtractionWorld, endpoints: list[str], tmp_path: Path) -> Any:
    def run_it(output: Path = tmp_path / "out", **changes: Any) -> int:
        return command.main(world.flags(output, **{"teacher_endpoints": endpoints, **changes}), "extract")

    return run_it


def kv_of(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {kv["teacher"]: kv for kv in entry["teacher_kvs"]}


def test_command_of_the_guide_starts_teachers_and_writes_the_file_that_the_guide_reads(
    world: ExtractionWorld, tmp_path: Path
) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    flags = {"output_name": "train_kv", "kv_compression": "right", "max_length": 2048}
    command_line = world.command(tmp_path / "kv_cache" / "dual", **flags)
    done = subprocess.run(
        command_line, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"will write .* \(0\.\d{3} GB in total\); the disk has .* free", done.stderr)
    assert re.search(r"ada: 40/40 samples, .*B/s, 0:00:00 left", done.stderr)
    data = load_pt(tmp_path / "kv_cache" / "dual" / "train_kv.pt")
    assert len(data) == 40
    first = data[0]["teacher_kvs"][0]
    assert first["seq_len"] < 24  # so all of its tokens fit the default budget
    assert first["keys"].shape == (3, 2, first["seq_len"], 16)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert sorted(path.name for path in (tmp_path / "kv_cache" / "dual").iterdir()) == [
        "logs",
        "train_kv.pt",
        "train_kv.report.json",
    ]


def test_every_sample_of_both_styles_has_the_kv_of_each_model(
    world: ExtractionWorld, extract: Any, tmp_path: Path
) -> None:
    assert extract(codec="raw", kv_budget=5) == 0
    data = load_pt(tmp_path / "out" / "train_kv.pt")
    assert [{name: entry[name] for name in entry if name != "teacher_kvs"} for entry in data] == [
        {"example_id": row["id"]} | {name: row[name] for name in ("prompt", "answer", "style", "task_type", "dataset")}
        for row in world.rows
    ]
    for name, path in world.teachers.items():
        model, tokenizer = load_reference(path), AutoTokenizer.from_pretrained(path)
        for number in (0, 1, 7, 39):
            row, found = world.rows[number], kv_of(data[number])[name]
            ids = tokenizer(row["prompt"] + row["reasoning"] + row["answer"])["input_ids"]
            expected = reference_kv(model, tuple(ids))
            assert found["seq_len"] == len(ids)
            assert found["positions"].tolist() == list(range(len(ids) - 5, len(ids)))
            torch.testing.assert_close(found["keys"].double(), expected.k_LHTD[:, :, -5:], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(found["values"].double(), expected.v_LHTD[:, :, -5:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("compression", ["r-kv", "full"])
def test_every_compression_keeps_its_number_of_tokens(
    world: ExtractionWorld, extract: Any, tmp_path: Path, compression: str
) -> None:
    assert extract(kv_compression=compression, limit=6) == 0
    data = load_pt(tmp_path / "out" / "train_kv.pt")
    assert len(data) == 6
    for entry in data:
        for kv in entry["teacher_kvs"]:
            text_tokens = kv["seq_len"] - (kv["teacher"] == "ben")  # llama's tokenizer adds a BOS
            slots = text_tokens if compression == "full" else min(24, text_tokens)
            assert kv["keys"].shape[2] == kv["values"].shape[2] == len(kv["positions"]) == slots
            assert kv["keys"].dtype == torch.bfloat16
            assert kv["positions"].tolist() == sorted(set(kv["positions"].tolist()))


def test_layer_and_head_scopes_give_positions_per_layer_and_head(extract: Any, tmp_path: Path) -> None:
    assert extract(kv_compression="r-kv", scope="head", kv_budget=3, limit=2) == 0
    kvs = kv_of(load_pt(tmp_path / "out" / "train_kv.pt")[0])
    assert kvs["ada"]["positions"].shape == (3, 2, 3)
    assert kvs["ben"]["positions"].shape == (4, 4, 3)


def test_shards_in_any_order_give_the_same_file_as_one_process(extract: Any, tmp_path: Path) -> None:
    assert extract(tmp_path / "one") == 0
    for number in (3, 1):
        assert extract(tmp_path / "three", shard=f"{number}/3") == 0
        assert not (tmp_path / "three" / "train_kv.pt").exists()
    assert extract(tmp_path / "three", shard="2/3") == 0
    assert_same_kv(tmp_path / "one" / "train_kv.pt", tmp_path / "three" / "train_kv.pt")
    assert not (tmp_path / "three" / "train_kv.parts").exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_run_resumes(
    world: ExtractionWorld,
    endpoints: list[str],
    extract: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: signal.Signals,
) -> None:
    # Small shards and one sample per request, so that the process is killed between two shards.
    code = (
        "import sys; from kvcore.store import kv_store as store; from extraction import command\n"
        "store.KVStoreWriter.__init__.__defaults__ = (9000,)\n"
        "sys.exit(command.main(sys.argv[1:], 'extract'))"
    )
    flags = world.flags(tmp_path / "out", teacher_endpoints=endpoints, batch_tokens=1)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags], cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL
    )
    store = tmp_path / "out" / "train_kv.parts" / "ada"
    try:
        wait_until(lambda: len(list(store.glob("*.safetensors"))) >= 3, seconds=60)
    finally:
        process.send_signal(how)
        status = process.wait()
    assert status == (-signal.SIGKILL if how == signal.SIGKILL else 128 + signal.SIGTERM)
    with KVStoreReader(store) as reader:
        stored = len(reader)
    assert 0 < stored < 40
    assert extract(batch_tokens=1) == 0
    assert f"ada: {40 - stored}/{40 - stored} samples" in capsys.readouterr().err
    assert extract(tmp_path / "whole") == 0
    assert_same_kv(tmp_path / "out" / "train_kv.pt", tmp_path / "whole" / "train_kv.pt")


def test_finished_extraction_is_neither_repeated_nor_replaced(
    extract: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract(limit=4) == 0
    written = (tmp_path / "out" / "train_kv.pt").stat().st_mtime_ns
    assert extract(limit=4, teacher_endpoints=["ada=127.0.0.1:1", "ben=127.0.0.1:1"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert extract(limit=5) == EXIT_USAGE
    assert "another limit (4, not 5)" in capsys.readouterr().err
    (tmp_path / "out" / "train_kv.report.json").unlink()
    assert extract(limit=4) == EXIT_USAGE
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "out" / "train_kv.pt").stat().st_mtime_ns == written


def test_crash_while_writing_file_needs_no_teacher_to_resume(
    extract: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish, "_decoded", crash)
        assert extract(limit=4) == 128 + signal.SIGINT
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train_kv.parts"]
    assert extract(limit=4, teacher_endpoints=["ada=127.0.0.1:1", "ben=127.0.0.1:1"]) == 0
    assert len(load_pt(tmp_path / "out" / "train_kv.pt")) == 4


def test_too_small_disk_is_refused_before_writing(
    extract: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _path: usage)
    assert extract() == EXIT_USAGE
    assert re.search(r"needs about 0\.00\d GB, and the disk of .* has 0\.000 GB free", capsys.readouterr().err)
    assert list((tmp_path / "out").rglob("*.safetensors")) == []


def test_skipped_samples_are_logged_and_listed(
    world: ExtractionWorld, extract: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [dict(row) for row in world.rows[:4]]
    lines[1]["prompt"] *= 300  # longer than --max_length
    lines[2]["prompt"] *= 60  # longer than the teachers' limit of 512 tokens
    dataset = tmp_path / "data.jsonl"
    dataset.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert extract(dataset_path=dataset) == EXIT_FAILED
    log = capsys.readouterr().err
    assert f"teacher 'ada': cannot serve '{lines[2]['id']}'" in log
    assert "this teacher takes at most 512" in log
    assert "1 samples lack K/V of a teacher" in log
    assert not (tmp_path / "out" / "train_kv.pt").exists()
    nowhere = ["ada=127.0.0.1:1", "ben=127.0.0.1:1"]
    assert extract(dataset_path=dataset, on_missing="skip", teacher_endpoints=nowhere) == 0
    assert "samples left out: 1; reason: longer than --max_length 2048" in capsys.readouterr().err
    data = load_pt(tmp_path / "out" / "train_kv.pt")
    assert [entry["example_id"] for entry in data] == [lines[0]["id"], lines[3]["id"]]
    report = json.loads((tmp_path / "out" / "train_kv.report.json").read_text(encoding="utf-8"))
    assert (report["samples"], report["written"]) == (4, 2)
    assert [(entry["id"], entry.get("teacher")) for entry in report["left_out"]] == [
        (lines[1]["id"], None),
        (lines[2]["id"], "ada"),
        (lines[2]["id"], "ben"),
    ]


@pytest.mark.nightly
def test_printed_command_trains_from_the_store_without_teachers(
    world: ExtractionWorld, extract: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"format": "store", "kv_compression": "r-kv", "kv_budget": 3, "output_name": "store"}
    assert extract(**settings) == 0
    store = tmp_path / "out" / "store"
    with KVStoreReader(store / "ben") as reader:
        assert len(reader) == 20
        assert reader.plan.layers == (0, 3)
    cot = tmp_path / "cot.jsonl"
    cot.write_text("".join(json.dumps(row) + "\n" for row in world.rows if row["style"] == "cot"), encoding="utf-8")
    config = {
        "student": {"path": str(world.student), "latents": 3, "passes": 2},
        "teachers": [{"name": "ada"}, {"name": "ben"}],
        "align": {"calibration_samples": 16},
        "data": {"train": str(cot)},
        "run": {"output_dir": str(tmp_path / "run"), "steps": 1, "global_batch": 4, "micro_batch": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    printed_flags = capsys.readouterr().err.split("kvdistill train ...")[1].split()
    training = [sys.executable, "-m", "kvdistill", "train", "--config", str(path), *printed_flags]
    done = subprocess.run(training, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()


def test_lost_teacher_ends_extraction_with_its_name(
    world: ExtractionWorld, endpoints: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = [endpoints[0], "ben=127.0.0.1:1"]
    began = time.monotonic()
    flags = world.flags(tmp_path / "out", teacher_endpoints=gone, patience_s=0.5)
    assert command.main(flags, "extract") == EXIT_FAILED
    assert "teacher 'ben'" in capsys.readouterr().err
    assert time.monotonic() - began < 30
