"""A fast stand-in for the training command of a sweep: takes the same flags and writes the same output files.

A file `fail` in the parent of the output directory makes it fail; a file `wait` makes it wait until SIGTERM.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from tests.support.finished_runs import write_run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--train_phase", default="1")
    flags, rest = parser.parse_known_args()
    _log(f"flags {rest}")
    options = flags.output_dir.parent
    if (options / "fail").exists():
        sys.exit(3)
    if (options / "wait").exists():
        signal.signal(signal.SIGTERM, _save_and_end)
        (flags.output_dir / "waiting").touch()
        while True:
            time.sleep(0.05)
    accuracy = 0.5 + random.Random(f"{rest}{flags.seed}").random() / 4
    folders = [flags.output_dir / f"stage{n}" for n in (1, 2)] if flags.train_phase == "all" else [flags.output_dir]
    for folder in folders:
        write_run(folder, (0.2, accuracy, 0.1), exist_ok=True)
        (folder / "best_model").mkdir()


def _save_and_end(_number: int, _frame: FrameType | None) -> None:
    # Saving a checkpoint takes time.
    time.sleep(1.0)
    _log("checkpoint saved")
    sys.exit(1)


def _log(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
