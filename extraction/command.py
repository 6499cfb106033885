"""The command `kvdistill extract`."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from extraction.config import FLAGS, ExtractConfig
from kvcore import early_checks
from kvcore.command_line import run_command
from kvcore.extras import require


def main(arguments: Sequence[str], program: str) -> int:
    """Runs one extraction and returns the exit status.

    SIGTERM ends it like Ctrl-C: fetched K/V are stored, servers are stopped, and the same command continues from there.
    """

    def command() -> None:
        config = FLAGS.read(arguments, program)
        require("train", program)
        _check(config)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S", force=True)
        for name in ("httpx", "datasets", "transformers"):
            logging.getLogger(name).setLevel(logging.WARNING)
        signal.signal(signal.SIGTERM, _exit_on_signal)
        from extraction.extract import extract  # noqa: PLC0415 - torch is slow to import

        extract(config)

    return run_command(program, command, "interrupted; run the same command again to resume")


def _check(config: ExtractConfig) -> None:
    """Refuses what cannot work before torch is imported and servers are started."""
    early_checks.check_output(config.output_dir, "--output_dir")
    early_checks.check_data(config.dataset_path, "--dataset_path")
    early_checks.check_model(config.student_model, "--student_model")
    if config.teacher_endpoints:
        return
    for model in config.teacher_models:
        early_checks.check_model(model, "--teacher_models", teacher=True)
    early_checks.check_device(config.device, "--device")
    if config.load_in_8bit:
        early_checks.check_quantised(config.device, "--load_in_8bit")


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)
