"""Tests of the demo's child processes and their logs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.demo.demo_processes import DemoError, run_logged
from experiments.demo.run_demo import main
from kvcore.errors import FieldError


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_run_logged_sends_lines_to_log_and_caller(tmp_path: Path) -> None:
    lines: list[str] = []
    run_logged(
        python("import sys; print('one'); print('two', file=sys.stderr)"), tmp_path / "l" / "x.log", lines.append
    )
    assert sorted(lines) == ["one", "two"]
    assert sorted((tmp_path / "l" / "x.log").read_text(encoding="utf-8").split()) == ["one", "two"]


def test_failed_command_raises_with_the_end_of_its_log(tmp_path: Path) -> None:
    code = "import sys\nfor i in range(99): print('line', i)\nsys.exit('the reason')"
    with pytest.raises(DemoError, match="code 1") as caught:
        run_logged(python(code), tmp_path / "x.log")
    assert "the reason" in str(caught.value)
    assert "line 98" in str(caught.value)
    assert "line 3\n" not in str(caught.value)


def test_process_ends_if_the_caller_raises(tmp_path: Path) -> None:
    def give_up(line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt) as caught:
        run_logged(
            python("import os, time; print(os.getpid(), flush=True); time.sleep(60)"), tmp_path / "x.log", give_up
        )
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(caught.value)), 0)


def test_demo_refuses_to_empty_a_foreign_folder(tmp_path: Path) -> None:
    theirs = tmp_path / "runs" / "precious.txt"
    theirs.parent.mkdir()
    theirs.touch()
    with pytest.raises(FieldError, match="was not made by the demo"):
        main(tmp_path, quick=True)
    assert theirs.exists()


def test_demo_config_and_processes_do_not_import_torch() -> None:
    code = "import sys, experiments.demo.demo_config, experiments.demo.demo_processes; sys.exit('torch' in sys.modules)"
    assert subprocess.run(python(code), check=False).returncode == 0
