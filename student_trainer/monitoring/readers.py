"""Records the readers of a run's page and metrics, so that a run can wait at its end until they have seen it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping


class Readers:
    """The last read of each path. Written by the server's thread, waited for by the training thread."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._changed = threading.Condition()

    def note(self, path: str) -> None:
        """Notes that somebody reads a path now."""
        with self._changed:
            self._last[path] = time.monotonic()
            self._changed.notify_all()

    def wait_for_each(self, within: Mapping[str, float]) -> None:
        """Waits until every path that is being read has been read once more.

        Args:
            within: seconds by path. A path is being read if its last read is at most so long ago, and it is waited
                for at most as long.
        """
        now = time.monotonic()
        with self._changed:
            for path, seconds in within.items():
                last = self._last.get(path)
                if last is not None and now - last <= seconds:
                    left = max(0.0, now + seconds - time.monotonic())
                    self._changed.wait_for(lambda path=path: self._last[path] > now, left)
