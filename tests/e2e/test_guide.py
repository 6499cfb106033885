"""Tests of docs/guide.md: every code block that needs no SLURM, unchanged, with tiny local models instead of the hub's.

The first block prepares its data in full; they are then shortened for the later blocks. Environment variables of the
guide's scripts make the training runs short.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from datasets import Dataset

from tests.support.guide import PAGE, STAGES, Block, Checkout, blocks, shorten
from tests.support.servers import wait_until
from tests.support.training import metrics

pytestmark = pytest.mark.slow

# Enough for 15000 training and 2000 validation records.
QUESTIONS = 1800
ROWS = 96
SHORT = {
    "DEVICE": "cpu",
    "GRAD_ACCUM": "2",
    "VAL_SAMPLES": "12",
    "EXTRA_ARGS": "--max_steps 2 --latent_passes 1 --calibration_samples 32 --logging_steps 1 --answer_tokens 2",
}


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    models = ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B")
    made = Checkout(tmp_path_factory.mktemp("guide") / "checkout", QUESTIONS, models, SHORT)
    made.add_benchmarks()
    return made


@pytest.fixture(scope="module")
def data(guide: Checkout) -> dict[str, Dataset]:
    """The two splits as the first block made them; on disk only their first rows remain."""
    guide.run(guide.block("MultiTaskReasoningDataset"))
    saved = {name: guide.directory / "data" / "prepared" / name for name in ("train", "val")}
    whole = {name: Dataset.load_from_disk(str(path), keep_in_memory=True) for name, path in saved.items()}
    for path in saved.values():
        shorten(path, ROWS)
    return whole


@pytest.fixture(scope="module")
def kv(guide: Checkout, data: dict[str, Dataset]) -> str:
    run_on_cpu_too(guide, guide.block("extract_dual_style_kv"), "--device cuda", "--device cpu", "torch sees 0 GPUs")
    return guide.run(guide.block("torch.load"))


@pytest.fixture(scope="module")
def stages(guide: Checkout, data: dict[str, Dataset]) -> Path:
    """The folder of the three stages."""
    guide.run(guide.block("run_three_stage_routing.sh --local"))
    return guide.directory / "outputs" / "three_stage_routing"


@pytest.fixture(scope="module")
def minimal_run(guide: Checkout, data: dict[str, Dataset]) -> Path:
    block = guide.block("--load_in_8bit true")
    run_on_cpu_too(guide, block, "--load_in_8bit true", "--load_in_8bit false", "load_in_8bit: needs a GPU")
    return guide.directory / "outputs" / "first_try"


@pytest.fixture(scope="module")
def table(guide: Checkout, stages: Path) -> str:
    """The printed comparison of the stages, after an evaluation of the last one."""
    guide.run(guide.block("multi_task_eval.py"))
    return guide.run(guide.block("pandas"))


@pytest.fixture(scope="module")
def report(guide: Checkout, stages: Path) -> Path:
    guide.run(guide.block("kvdistill report"))
    return guide.directory / "outputs" / "report"


@pytest.fixture(scope="module")
def listed(guide: Checkout) -> str:
    return guide.run(guide.block("kvdistill sweep"))


@pytest.fixture(scope="module")
def curves(guide: Checkout, stages: Path) -> list[str]:
    """The names that TensorBoard shows."""
    with tensorboard(guide) as url:
        tags: dict[str, dict[str, object]] = {}

        def read() -> bool:
            # TensorBoard listens before it has read everything.
            tags.update(httpx.get(f"{url}data/plugin/scalars/tags", timeout=30).json())
            return any("val/kv_loss" in names for names in tags.values())

        wait_until(read)
    return [name for names in tags.values() for name in names]


def test_splits_have_the_requested_size_and_share_no_question(data: dict[str, Dataset]) -> None:
    assert {name: len(split) for name, split in data.items()} == {"train": 15000, "val": 2000}
    train, val = ({row.split("-")[1] for row in split["id"]} for split in data.values())
    assert not train & val
    assert data["train"]["dataset"].count("math23k") / 15000 == pytest.approx(0.2, abs=0.001)
    assert {*data["train"]["style"]} == {"cot", "direct"}


def test_extraction_prints_the_number_of_samples_and_the_shapes(kv: str) -> None:
    assert kv.splitlines() == [str(ROWS), "torch.Size([3, 2, 24, 16])"]


def test_three_stages_train_on_the_prepared_data(stages: Path) -> None:
    data_of_stages = [path.read_text(encoding="utf-8").count("\n") for path in (stages / "data").glob("train.jsonl")]
    assert all(0 < count < ROWS for count in data_of_stages)
    for stage in STAGES:
        assert metrics(stages / stage, "train/loss").keys() == {1, 2}
        assert metrics(stages / stage, "routing/weights_mean/Qwen2.5-14B").keys() == {1, 2}
        assert (stages / stage / "best_model" / "latent.safetensors").is_file()


def test_minimal_training_command_trains(minimal_run: Path) -> None:
    assert (minimal_run / "best_model" / "latent.safetensors").is_file()
    assert metrics(minimal_run, "val/task_metrics/accuracy")


def test_evaluation_makes_a_table_of_the_stages(table: str, stages: Path) -> None:
    results = json.loads((stages / "stage3_learnable" / "eval_results.json").read_text(encoding="utf-8"))
    named = ["gsm8k_test", "math500", "bbh", "gpqa", "truthfulqa", "cmmlu_subset", "ceval_subset"]
    assert [name for name in results if name not in ("val", "average")] == named
    assert results["average"] == pytest.approx(sum(results[name]["score"] for name in named) / 7)
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    assert all(stage in table.splitlines()[0] for stage in STAGES)
    assert float(rows["bbh"][-1]) == pytest.approx(results["bbh"]["score"], abs=0.01)
    assert "average" not in rows


def test_a_report_shows_every_stage(report: Path) -> None:
    assert all(stage in (report / "report.html").read_text(encoding="utf-8") for stage in STAGES)
    assert (report / "report.csv").read_text(encoding="utf-8").count("\n") == 1 + len(STAGES)
    assert {path.stem for path in report.glob("*.png")} >= {"learning_curves", "routing_weights", "kv_loss_by_layer"}


def test_tensorboard_shows_the_curves_that_the_guide_reads(curves: list[str]) -> None:
    assert {"val/kv_loss", "train/kv_loss", "val/task_metrics"} <= {*curves}
    assert {"routing/entropy", "kv/stall_fraction", "routing/weights_mean"} <= {*curves}


def test_a_sweep_lists_its_runs(listed: str) -> None:
    assert all(f"{compression}/seed{seed}" in listed for compression in ("full", "right", "r-kv") for seed in range(3))


@pytest.mark.usefixtures("kv", "minimal_run", "table", "report", "listed", "curves")
def test_every_block_that_needs_no_slurm_was_run(guide: Checkout) -> None:
    assert {*guide.ran} == {block for block in blocks(PAGE) if not block.needs_slurm}


def run_on_cpu_too(guide: Checkout, block: Block, asked: str, instead: str, refusal: str) -> None:
    """Run a block that needs a GPU. Without one, check its refusal and run it with `asked` replaced by `instead`."""
    assert asked in block.text
    if torch.cuda.is_available():
        guide.run(block)
        return
    done = guide.attempt(block)
    assert done.returncode != 0
    assert refusal in done.stdout
    assert "Traceback" not in done.stdout
    guide.run(replace(block, text=block.text.replace(asked, instead)))


@contextmanager
def tensorboard(guide: Checkout) -> Iterator[str]:
    """Run the block that starts TensorBoard, and yield its address once it listens."""
    log = guide.directory / "tensorboard.log"
    with log.open("wb") as out:
        command = guide.command(guide.block("tensorboard"))
        process = subprocess.Popen(
            command, cwd=guide.directory, env=guide.environment, stdout=out, stderr=out, start_new_session=True
        )
    address = re.compile(r"at (http://\S+)")
    try:
        wait_until(lambda: process.poll() is not None or bool(address.search(log.read_text(encoding="utf-8"))))
        found = address.search(log.read_text(encoding="utf-8"))
        assert found, log.read_text(encoding="utf-8")
        yield found[1]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
