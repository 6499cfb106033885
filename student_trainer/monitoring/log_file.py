"""The log of a training command in a file, beside what it prints."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from kvcore.errors import FieldError

logger = logging.getLogger(__name__)
LOG = "train.log"


@contextlib.contextmanager
def kept_log(directory: Path) -> Iterator[None]:
    """Appends what is logged in the block, and the error that ends it, to `train.log` in a directory.

    Raises:
        FieldError: the file cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(directory / LOG, encoding="utf-8")
    except OSError as error:
        raise FieldError("run.output_dir", f"cannot write {directory / LOG}: {error.strerror or error}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except BaseException as error:
        # The caller prints the error; this line is for readers of the file.
        message = f"{type(error).__name__}: {error}"
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, message, (), None))
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
