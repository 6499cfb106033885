"""Tests of `kvdistill doctor`: it reports the problems of a machine and the next steps."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from kvcore.errors import FieldError
from kvdistill import doctor
from kvdistill.cli import main
from kvdistill.doctor import Check, checks, report

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
    run.write_text(
        "student: {path: s}\nteachers: [{name: a, endpoints: ['n1:1', 'n2:2']}]\ndata: {train: t}\n"
        "run: {output_dir: o, steps: 1}\n"
    )
    monkeypatch.setattr(sys, "argv", ["kvdistill", "doctor", "--teacher", "n0:0", "--config", str(run)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert sorted(asked) == ["n0:0", "n1:1", "n2:2"]
    assert "problem" not in capsys.readouterr().out


def test_report_shows_next_step_below_problem() -> None:
    shown = report([Check("a", "ok", "fine"), Check("long name", "problem", "broken", "fix it")])
    assert shown.splitlines() == ["ok       a          fine", "problem  long name  broken", "         next: fix it"]
