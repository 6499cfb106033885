"""Tests of `kvdistill doctor`: it reports the problems of a machine and the next steps."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import pytest

from data.records import Record, write_records
from kvcore.config import parse
from kvcore.errors import FieldError
from kvdistill import doctor
from kvdistill.cli import main
from kvdistill.doctor import Check, checks, report
from student_trainer.config import TrainConfig
from tests.support.tiny_models import build_model, save_tiny_model, tiny_spec

# Fast imports. The real imports are tested in tests/integration.
QUICK = {"torch": "print('1.2.3')"}


@pytest.fixture(autouse=True)
def quick_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", QUICK)
    monkeypatch.setattr(doctor, "GPUS", "pass")


def found(name: str, disk: Path) -> Check:
    (check,) = [check for check in checks([], disk) if check.name == name]
    return check


def test_doctor_finds_no_problem_on_working_machine(tmp_path: Path) -> None:
    states = {check.name: check.state for check in checks([], tmp_path / "not" / "there" / "yet")}
    assert "problem" not in states.values()
    assert states["torch"] == states["ports"] == states["disk"] == "ok"
    assert found("torch", tmp_path).found == "1.2.3"


def test_failed_import_is_a_problem_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", {"torch": "import no_such_module_anywhere"})
    check = found("torch", tmp_path)
    assert check.state == "problem"
    assert "No module named 'no_such_module_anywhere'" in check.found
    assert "make setup" in check.next_step


def test_crashing_import_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", {"torch": "import os; os.abort()"})
    assert found("torch", tmp_path).found == "cannot be imported: exit status -6"


def test_a_full_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 2**70)
    check = found("disk", tmp_path)
    assert check.state == "problem"
    assert "--output" in check.next_step


def test_gpus_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GPUS", "print('0: A, 80 GiB'); print('1: B, 80 GiB')")
    assert found("GPUs", tmp_path) == Check("GPUs", "ok", "0: A, 80 GiB; 1: B, 80 GiB")


def test_gpus_that_torch_cannot_use_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = found("GPUs", tmp_path)
    assert check.state == "problem"
    assert "CUDA build of torch" in check.next_step


def test_unreachable_teacher_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{held.getsockname()[1]}"
        arguments = ["kvdistill", "doctor", "--teacher", endpoint, "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert f"problem  teacher {endpoint}  UNAVAILABLE" in shown
    assert "next: check that kvdistill serve runs there" in shown


def test_teacher_without_port_raises_with_its_flag(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="--teacher: expected HOST:PORT, got 'node1'"):
        checks(["node1"], tmp_path)


def test_teachers_of_config_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def answer(endpoint: str) -> Check:
        asked.append(endpoint)
        return Check(endpoint, "ok", "there")

    monkeypatch.setattr(doctor, "_teacher", answer)
    run = tmp_path / "run.yaml"
    train = tmp_path / "train.jsonl"
    write_records(train, [Record(str(number), "Q?", " R", " A") for number in range(3)])
    run.write_text(
        f"student: {{path: s}}\nteachers: [{{name: a, endpoints: ['n1:1', 'n2:2']}}]\ndata: {{train: {train}}}\n"
        f"run: {{output_dir: {tmp_path / 'runs'}, steps: 1}}\n"
    )
    monkeypatch.setattr(sys, "argv", ["kvdistill", "doctor", "--teacher", "n0:9", "--config", str(run)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert sorted(asked) == ["n0:9", "n1:1", "n2:2"]
    shown = capsys.readouterr().out
    assert "problem" not in shown
    assert f"{train}: 3 records" in shown
    assert f"GiB free for {tmp_path / 'runs'}" in shown


def run_of(directory: Path, student: Path, **sections: dict[str, object]) -> TrainConfig:
    tree = {
        "student": {"path": str(student)},
        "data": {"train": str(directory / "train.jsonl"), "val": str(directory / "val.jsonl")},
        "run": {"output_dir": str(directory), "steps": 1},
    }
    return parse(tree | sections, TrainConfig)


def test_student_and_data_of_a_run_are_checked(tmp_path: Path) -> None:
    student = save_tiny_model(tmp_path / "student", tiny_spec("qwen2"))
    write_records(tmp_path / "train.jsonl", [Record("a", "Q?", " R", " A")])
    named = {check.name: check for check in checks([], None, run_of(tmp_path, student))}
    size = sum(parameter.numel() for parameter in build_model(tiny_spec("qwen2")).parameters())
    assert named["student"] == Check("student", "ok", f"{student}: qwen2, {size / 1e6:,.1f} million parameters")
    assert named["data.train"].found.endswith("train.jsonl: 1 records")
    assert (named["data.val"].state, named["disk"].state) == ("problem", "ok")
    assert "no such data file" in named["data.val"].found
    missing = {check.name: check for check in checks([], None, run_of(tmp_path, tmp_path / "none"))}
    assert missing["student"].found == f"there is no directory '{tmp_path / 'none'}', and it is not a hub id"
    hub = {check.name: check for check in checks([], None, run_of(tmp_path, Path("Qwen/Qwen2.5-1.5B")))}
    assert hub["student"].state == "note"


def test_disk_must_hold_the_checkpoints_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = save_tiny_model(tmp_path / "student", tiny_spec("qwen2"))
    run = run_of(tmp_path, student, run={"output_dir": str(tmp_path), "steps": 1, "keep_checkpoints": 4})
    size = sum(parameter.numel() for parameter in build_model(tiny_spec("qwen2")).parameters())
    needed, usage = 5 * 12 * size, shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 0)
    for free, state in ((needed, "ok"), (needed - 1, "problem")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, free=free: usage._replace(free=free))
        (disk,) = [check for check in checks([], None, run) if check.name == "disk"]
        assert disk.state == state
    assert disk.next_step.endswith("set run.output_dir to another folder")


def test_report_shows_next_step_below_problem() -> None:
    shown = report([Check("a", "ok", "fine"), Check("long name", "problem", "broken", "fix it")])
    assert shown.splitlines() == ["ok       a          fine", "problem  long name  broken", "         next: fix it"]
