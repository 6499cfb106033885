"""Files that other programs replace while a process runs, such as certificates and tokens."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from kvcore.errors import FieldError

logger = logging.getLogger(__name__)

# Seconds between two looks at the files.
LOOK_SECONDS = 1.0

T = TypeVar("T")
# Times of the last change of content and of the file itself (its mode, its name), size and number.
_Signature = tuple[tuple[int, int, int, int] | None, ...]


class WatchedFiles(Generic[T]):
    """What `read` makes of some files. They are read again after a change; while that fails, the last result stays.

    Callable from any thread.

    Args:
        paths: of the files.
        read: reads them. It raises FieldError if they are missing or invalid, also here at the start.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._paths, self._read = tuple(paths), read
        self._lock = threading.Lock()
        self._signature, self._looked_at = self._stat(), time.monotonic()
        self._result = read()

    def current(self, *, at_once: bool = False) -> T:
        """The result for the newest valid content.

        Args:
            at_once: look at the files even if that was done within the last second.
        """
        with self._lock:
            now = time.monotonic()
            if not at_once and now < self._looked_at + LOOK_SECONDS:
                return self._result
            self._looked_at = now
            signature = self._stat()
            if signature != self._signature:
                self._signature = signature
                try:
                    self._result = self._read()
                except FieldError as error:
                    logger.warning("%s; the content from before stays in use", error)
                else:
                    logger.info("read again after a change: %s", ", ".join(map(str, self._paths)))
            return self._result

    def _stat(self) -> _Signature:
        found: list[tuple[int, int, int, int] | None] = []
        for path in self._paths:
            try:
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino))
            except OSError:
                found.append(None)
        return tuple(found)
