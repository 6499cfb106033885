"""The demo's child processes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from kvcore.errors import KVDistillError
from student_trainer.launching.processes import end, start_logged, tail

# The same on every machine: no accelerator, and one thread per process, since there are as many processes as cores.
CPU_ONLY = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


class DemoError(KVDistillError):
    """A process of the demo failed, or its replay differs from the recorded run."""


def run_logged(command: list[str], log: Path, on_line: Callable[[str], None] = lambda _line: None) -> None:
    """Runs a command to its end; its output goes to `log`, and line by line to `on_line`.

    Raises:
        DemoError: it failed; with the end of its log.
    """
    with start_logged(command, log, CPU_ONLY, pipe=True) as process:
        try:
            assert process.stdout is not None
            with log.open("a", encoding="utf-8") as file:
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    on_line(line.rstrip("\n"))
        except BaseException:
            end(process)
            raise
    check(process, command, log)


def check(process: subprocess.Popen[str], command: list[str], log: Path) -> None:
    """Raises a DemoError if an ended process failed."""
    if process.returncode != 0:
        shown = " ".join(command[1:])
        raise DemoError(f"`{shown}` ended with code {process.returncode}; the end of {log}:\n{tail(log)}")
