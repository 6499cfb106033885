"""Tests of the launcher of a container's ranks: it passes signals on, and a clean stop exits with 0."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = "import sys; from student_trainer.launching.ranks import run_ranks; sys.exit(run_ranks({count}, {command}))"
# A rank that takes a moment to save its checkpoint after SIGTERM or SIGINT, and then exits with `status`. The second
# rank takes longer, and another signal ends it at once.
RANK = """
import os, pathlib, signal, sys, time
def stop(_number, _frame):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(0.1 + int(os.environ["RANK"]))
    (folder / f"saved{os.environ['RANK']}").touch()
    sys.exit(status)
folder, status = pathlib.Path(sys.argv[1]), int(sys.argv[2])
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
(folder / f"started{os.environ['RANK']}").write_text(os.environ["WORLD_SIZE"])
time.sleep(60)
"""


def launched(command: list[str], count: int = 2) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", LAUNCH.format(count=count, command=command)])


def wait_for(folder: Path, names: set[str], process: subprocess.Popen[bytes]) -> None:
    while {path.name for path in folder.iterdir() if path.name in names} != names:
        assert process.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("status", "expected"), [(143, 0), (130, 0), (0, 0), (1, 1)])
def test_a_stop_is_clean_if_every_rank_saved(
    number: signal.Signals, status: int, expected: int, tmp_path: Path
) -> None:
    process = launched([sys.executable, "-c", RANK, str(tmp_path), str(status)])
    wait_for(tmp_path, {"started0", "started1"}, process)
    assert (tmp_path / "started0").read_text() == "2"
    process.send_signal(number)
    assert process.wait(30) == expected
    assert {path.name for path in tmp_path.glob("saved*")} == {"saved0", "saved1"}


def test_a_failed_rank_ends_the_others_and_gives_its_status(tmp_path: Path) -> None:
    code = f"import os, sys\nif os.environ['RANK'] == '1': sys.exit(3)\n{RANK}"
    process = launched([sys.executable, "-c", code, str(tmp_path), "143"])
    assert process.wait(30) == 3


def test_finished_ranks_exit_with_0() -> None:
    assert launched([sys.executable, "-c", "pass"], 3).wait(30) == 0
