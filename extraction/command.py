"""The command line of `kvdistill extract`."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from extraction.flags import read_flags
from kvcore.errors import ConfigError, KVDistillError
from kvcore.extras import require

EXIT_FAILED = 1
EXIT_USAGE = 2


def main(arguments: Sequence[str], program: str) -> int:
    """Runs one extraction and returns the exit status; user errors are printed in one line on stderr.

    SIGTERM and Ctrl-C store what was fetched and stop local servers; the same command resumes from there.
    """
    try:
        config = read_flags(arguments, program)
        require("train", program)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S", force=True)
        for name in ("httpx", "datasets", "transformers"):
            logging.getLogger(name).setLevel(logging.WARNING)
        signal.signal(signal.SIGTERM, _exit_on_signal)
        from extraction.extract import extract  # noqa: PLC0415 - torch is slow to import; flags are checked first

        extract(config)
    except KVDistillError as error:
        sys.stderr.write(f"{program}: {error.line()}\n")
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted; run the same command again to resume\n")
        return 128 + signal.SIGINT
    return 0


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)
