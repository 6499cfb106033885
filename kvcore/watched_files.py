"""Files that other programs replace while a process runs, such as certificates and tokens."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from kvcore.errors import FieldError

logger = logging.getLogger(__name__)

T = TypeVar("T")
_Signature = tuple[tuple[int, int, int] | None, ...]


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
        self._signature = self._stat()
        self._result = read()

    def current(self) -> T:
        """The result for the newest valid content. Costs one `stat` per file if nothing has changed."""
        with self._lock:
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
        found: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
            except OSError:
                found.append(None)
        return tuple(found)
