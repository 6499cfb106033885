"""Tests of child processes: they end on request and together with their parent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from student_trainer.launching import processes
from student_trainer.launching.processes import end, killed_with_parent, start_logged

SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_for_line(log: Path) -> str:
    while not log.is_file() or not log.read_text(encoding="utf-8").endswith("\n"):
        time.sleep(0.01)
    return log.read_text(encoding="utf-8").strip()


def test_end_kills_process_that_ignores_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.2)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    process = start_logged(python(code), tmp_path / "x.log")
    wait_for_line(tmp_path / "x.log")
    end(process)
    assert process.returncode == -signal.SIGKILL


def test_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    parent = subprocess.Popen(
        python(
            "import sys, time; from pathlib import Path\n"
            "from student_trainer.launching.processes import killed_with_parent, start_logged\n"
            f"start_logged(killed_with_parent([sys.executable, '-c', {SLEEP!r}]), Path({str(log)!r})); time.sleep(60)"
        )
    )
    child = psutil.Process(int(wait_for_line(log)))
    parent.kill()
    parent.wait()
    child.wait(10)
    assert not psutil.pid_exists(child.pid)


def test_killed_with_parent_keeps_pid_and_exit_status(tmp_path: Path) -> None:
    process = start_logged(killed_with_parent(python("import sys; print('said'); sys.exit(7)")), tmp_path / "x.log")
    assert process.wait(30) == 7
    assert wait_for_line(tmp_path / "x.log") == "said"
    process = start_logged(killed_with_parent(python(SLEEP)), tmp_path / "y.log")
    assert int(wait_for_line(tmp_path / "y.log")) == process.pid
    end(process)
