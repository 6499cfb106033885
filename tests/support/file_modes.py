"""The modes of files that a test writes."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    """Sets the umask inside the block."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(directory: Path) -> dict[str, str]:
    """The mode of each file below a directory, in octal, by name."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.name: f"{stat.S_IMODE(path.stat().st_mode):o}" for path in files}
