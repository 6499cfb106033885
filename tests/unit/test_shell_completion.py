"""Shell completion: a script for the shell, and proposals that come at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = "import sys; sys.argv[0] = 'kvdistill'; from kvdistill.cli import main; main()"
WATCHED = (
    "import atexit, sys;"
    " atexit.register(lambda: print(*({'torch', 'grpc', 'transformers'} & set(sys.modules)), sep=''));"
)


def complete(typed: str, code: str = PROGRAM) -> list[str]:
    """What bash would be given for a line whose last word is being typed."""
    environment = {
        **os.environ,
        "_KVDISTILL_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("typed", "proposed"),
    [
        ("kvdistill tr", ["train"]),
        ("kvdistill train --con", ["--config"]),
        ("kvdistill serve --engine h", ["hf"]),
        ("kvdistill extract --teacher_m", ["--teacher_models"]),
        ("kvdistill eval --eval_d", ["--eval_datasets"]),
        ("kvdistill eval --eval-d", ["--eval-datasets"]),
        ("kvdistill extract data/prep", []),
    ],
)
def test_what_was_begun_is_completed(typed: str, proposed: list[str]) -> None:
    assert complete(typed) == proposed


def test_every_command_is_proposed() -> None:
    assert set(complete("kvdistill ")) >= {"serve", "train", "extract", "eval", "demo", "report", "sweep"}


def test_proposals_load_nothing_heavy() -> None:
    assert complete("kvdistill extract --teacher_m", WATCHED + PROGRAM) == ["--teacher_models"]


def test_bash_gets_a_script_that_bash_can_read() -> None:
    shown = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{PROGRAM}" --show-completion; true'],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert "_KVDISTILL_COMPLETE=complete_bash" in shown
    subprocess.run(["bash", "-n"], input=shown, text=True, check=True, timeout=60)
