"""The example package, installed with pip, adds implementations that real servers, plans and runs use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.records import write_records
from data.synthetic import ChainTask, make_splits
from tests.support.servers import REPOSITORY, TeacherProcess, running_teacher
from tests.support.tiny_models import save_tiny_model, tiny_spec

pytestmark = pytest.mark.slow

EXAMPLE = REPOSITORY / "docs" / "examples" / "plugin"

FETCH = """
import sys, kvdistill
plan = kvdistill.KVPlan(
    layers=(0, 2),
    selection=kvdistill.Selection(selector="both_ends", budget=5, span="all"),
    codec=kvdistill.CodecSpec(name="fp16", max_relative_error=0.01),
)
assert "torch" not in sys.modules, "names are checked without imports"
with kvdistill.TeacherClient(ENDPOINT) as teacher:
    info = teacher.info
    assert info.selectors[-1] == "both_ends" and info.codecs[-1] == "fp16", info
    kv = teacher.fetch(["The capital of France is Paris."], plan)
    exact = teacher.fetch(["The capital of France is Paris."], layers=[0, 2], codec="raw")
count = len(kv.token_ids[0])
assert count > 6
wanted = [0, 1, count - 3, count - 2, count - 1]
assert kv.positions_BLHM[0, 0, 0].tolist() == wanted, kv.positions_BLHM
assert kv.k_BLHMD.equal(exact.k_BLHMD[:, :, :, wanted].half().float())
"""

TRAIN = """
import json, kvdistill
first, second = (
    kvdistill.train({**CONFIG, "loss": {"kv_loss": name}, "run": {**CONFIG["run"], "output_dir": name}})
    for name in ("absolute", "mse")
)
print(json.dumps([str(first.best_model), first.metrics["steps"], second.metrics["steps"]]))
"""

FAMILY = """
from data.multi_task_dataset import MultiTaskReasoningDataset
train, val = MultiTaskReasoningDataset(
    base_datasets=["sums"], use_extended=False, math23k_ratio=0.0, train_samples=4, val_samples=2,
    local_paths={"sums": "sums.jsonl"}, styles=["cot"],
).load_and_prepare()
assert {row["task_type"] for row in train} == {"arithmetic"}
"""

UNKNOWN = """
import kvdistill
for selector in ("both_end", "both_ends"):
    try: print(kvdistill.Selection(selector=selector, budget=2).selector)
    except ValueError as error: print(error)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose Python finds the installed example."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("target")
    shutil.copytree(EXAMPLE, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, timeout=100)
    path = f"{target}{os.pathsep}{REPOSITORY}"
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    directory = tmp_path_factory.mktemp("teacher")
    model = save_tiny_model(directory / "model", tiny_spec("qwen2", seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment["PYTHONPATH"])
        with running_teacher(model, directory / "server.log") as running:
            yield running


def python(code: str, environment: dict[str, str], directory: Path) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_selector_and_a_codec_are_announced_and_executed(
    server: TeacherProcess, environment: dict[str, str], tmp_path: Path
) -> None:
    python(f"ENDPOINT = {server.endpoint!r}\n{FETCH}", environment, tmp_path)


@pytest.mark.timeout(400)
def test_a_run_trains_with_selector_codec_and_loss(
    server: TeacherProcess, environment: dict[str, str], tmp_path: Path
) -> None:
    splits = make_splits(ChainTask(), 48, 8, 1, seed=0)
    for name, records in (("train", splits.train), ("val", splits.val)):
        write_records(tmp_path / f"{name}.jsonl", records)
    save_tiny_model(tmp_path / "student", tiny_spec("qwen3", layers=2, kv_heads=1, seed=3))
    selection = {"selector": "both_ends", "budget": 3}
    config = {
        "student": {"path": "student", "latents": 3, "passes": 2},
        "teachers": [{"name": "ada", "endpoints": [server.endpoint]}],
        "kv": {"selection": selection, "codec": {"name": "fp16"}, "mode": "record", "store": "store"},
        "align": {"calibration_samples": 32},
        "data": {"train": "train.jsonl", "val": "val.jsonl", "answer_tokens": 2},
        "run": {"steps": 2, "global_batch": 4, "micro_batch": 2, "log_every": 1},
    }
    printed = python(f"CONFIG = {config!r}\n{TRAIN}", environment, tmp_path)
    best, *steps = json.loads(printed.splitlines()[-1])
    assert steps == [2, 2]
    assert (tmp_path / best / "config.json").is_file()
    losses = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["train/kv_objective"]
        for name in ("absolute", "mse")
    ]
    assert losses[0] != losses[1]


def test_a_dataset_is_prepared(environment: dict[str, str], tmp_path: Path) -> None:
    rows = [{"terms": [index, index + 1]} for index in range(40)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    python(FAMILY, environment, tmp_path)


def test_a_name_is_known_only_where_the_package_is_installed(environment: dict[str, str], tmp_path: Path) -> None:
    wrong, right = python(UNKNOWN, environment, tmp_path).strip().rsplit("\n", 1)
    assert "did you mean 'both_ends'" in wrong
    assert right == "both_ends"
    without = python(UNKNOWN, {**environment, "PYTHONPATH": str(REPOSITORY)}, tmp_path)
    assert without.count("expected one of") == 2
