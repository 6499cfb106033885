"""Tests of the wheel: installed outside the checkout, its commands work, with and without the extra `train`."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvdistill.own_packages import PACKAGES
from tests.support.installed_wheel import Environment, build_wheel, install, source_files
from tests.support.servers import TeacherProcess

COMMANDS = ("serve", "train", "plan", "doctor", "inspect", "extract", "eval", "demo", "report", "sweep")
EXTRACT = (
    "--student_model",
    "student",
    "--teacher_models",
    "teacher_a",
    "--dataset_path",
    "val.jsonl",
    "--output_dir",
    "kv",
)
# Writes the untrained models of the demo, and questions, to the current directory.
MAKE_INPUTS = """
from pathlib import Path
from data.records import write_records
from data.synthetic import ChainTask, make_splits
from experiments.demo.make_models import make_model
from experiments.demo.tokenizers import build_tokenizer
splits = make_splits(ChainTask(), 64, 8, 1, seed=0)
write_records(Path("train.jsonl"), splits.train)
write_records(Path("val.jsonl"), splits.val)
for name in ("teacher_a", "student"):
    make_model(name, build_tokenizer(name, splits.train), Path(name))
"""
TRAINING = {
    "student": {"path": "student", "mode": "latent", "latents": 3, "passes": 2},
    "kv": {"selection": {"selector": "r_kv", "budget": 3}},
    "align": {"calibration_samples": 32},
    "data": {"train": "train.jsonl", "val": "val.jsonl", "answer_tokens": 2},
    "run": {"output_dir": "run", "steps": 5, "global_batch": 8, "micro_batch": 4, "log_every": 1},
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory that contains the user's own package `data`."""
    directory = tmp_path_factory.mktemp("work")
    (directory / "data").mkdir()
    (directory / "data" / "__init__.py").touch()
    return directory


@pytest.fixture(scope="module")
def plain(wheel: Path, work: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment as after `pip install kvdistill`."""
    return install(wheel, tmp_path_factory.mktemp("plain"), work)


@pytest.fixture(scope="module")
def full(wheel: Path, work: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment as after `pip install 'kvdistill[train]'`."""
    return install(wheel, tmp_path_factory.mktemp("full"), work, extras=["train"])


@pytest.fixture(scope="module")
def teacher(plain: Environment, full: Environment) -> Iterator[TeacherProcess]:
    """A teacher of the demo, served by a plain install."""
    made = full.run("python", "-P", "-c", MAKE_INPUTS)
    assert made.returncode == 0, made.stderr
    log = plain.work / "serve.log"
    flags = ("--model", "teacher_a", "--device", "cpu", "--dtype", "fp32", "--grpc-port", 0, "--http-port", 0)
    server = TeacherProcess(plain.start(log, "kvdistill", "serve", *flags), log)
    try:
        yield server.wait_ready()
    finally:
        assert server.stop() == 0


@pytest.fixture(scope="module")
def run_file(teacher: TeacherProcess, work: Path) -> Path:
    config: dict[str, Any] = {**TRAINING, "teachers": [{"name": "a", "endpoints": [teacher.endpoint]}]}
    (work / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return work / "run.yaml"


def test_wheel_has_exactly_the_files_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {name for name in source_files() if name.partition("/")[0] in {*PACKAGES, "kvdistill"}}


def test_packages_are_imported_from_the_wheel(plain: Environment) -> None:
    program = "import importlib.util as i, sys; print(*(i.find_spec(n).origin for n in sys.argv[1:]), sep='\\n')"
    found = plain.run("python", "-P", "-c", program, *PACKAGES, "kvdistill")
    assert found.returncode == 0, found.stderr
    assert all(Path(line).is_relative_to(plain.site_packages) for line in found.stdout.splitlines())


def test_version_command_prints_the_version_of_the_wheel(plain: Environment, wheel: Path) -> None:
    shown = plain.run("kvdistill", "--version")
    assert (shown.returncode, shown.stdout) == (0, f"kvdistill {wheel.name.split('-')[1]}\n")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=["kvdistill", *COMMANDS])
def test_help_works_without_extras(plain: Environment, command: tuple[str, ...]) -> None:
    shown = plain.run("kvdistill", *command, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "kvdistill" in shown.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--config", "run.yaml"),
        ("extract", *EXTRACT),
        ("eval", "--model_path", "student", "--eval_datasets", "gsm8k_test", "--output_file", "scores.json"),
        ("demo",),
        ("report", "run"),
        ("sweep", "sweep.yaml"),
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.usefixtures("run_file")
def test_command_names_missing_extra(plain: Environment, arguments: tuple[str, ...]) -> None:
    ended = plain.run("kvdistill", *arguments)
    assert ended.returncode == 2
    assert f"kvdistill {arguments[0]} needs accelerate, datasets, deepspeed" in ended.stderr
    assert ended.stderr.endswith("not installed here: pip install 'kvdistill[train]'\n")
    assert ended.stderr.count("\n") == 1


def test_plain_install_inspects_teachers_and_plans_a_run(
    plain: Environment, teacher: TeacherProcess, run_file: Path
) -> None:
    for arguments in (
        ("inspect", teacher.endpoint),
        ("plan", "--config", run_file),
        ("doctor", "--teacher", teacher.endpoint),
    ):
        ended = plain.run("kvdistill", *arguments)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "extra train" in ended.stdout
    assert "pip install 'kvdistill[train]'" in ended.stdout


def test_full_install_trains_reports_and_evaluates(full: Environment, run_file: Path) -> None:
    trained = full.run("kvdistill", "train", "--config", run_file)
    assert trained.returncode == 0, trained.stderr
    steps = [json.loads(line)["step"] for line in (full.work / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    assert max(steps) == 5
    reported = full.run("kvdistill", "report", "run", "--output", "report")
    assert reported.returncode == 0, reported.stderr
    question = {"question": "How much is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}
    (full.work / "gsm8k_test.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    flags = ("--model_path", "run/best_model", "--eval_datasets", "gsm8k_test", "--output_file", "scores.json")
    scored = full.run("kvdistill", "eval", *flags, "--data_dir", ".", "--max_new_tokens", "4")
    assert scored.returncode == 0, scored.stderr


@pytest.mark.usefixtures("teacher")
def test_servers_that_a_command_starts_do_not_import_the_users_package(full: Environment) -> None:
    extracted = full.run("kvdistill", "extract", *EXTRACT)
    assert extracted.returncode == 0, extracted.stderr


def test_user_package_that_hides_a_kvdistill_package_is_named(plain: Environment) -> None:
    ended = plain.run("python", "-m", "kvdistill", "--version")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"kvdistill: {plain.work / 'data'} hides the package 'data'")
    assert ended.stderr.count("\n") == 1
    assert plain.run("python", "-P", "-m", "kvdistill", "--version").returncode == 0
