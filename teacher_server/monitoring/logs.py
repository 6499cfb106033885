"""Logs as JSON Lines on stderr: one object per event, made for machines and still greppable by people."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, event, then the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Renders a record; line breaks inside values are escaped, so one record is always one line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        entry.update(getattr(record, "fields", {}))
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure(level: str) -> None:
    """Sends every logger of the process to stderr as JSON; libraries are heard from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("teacher_server", "kvcore"):
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(capture=True)


def log_event(
    logger: logging.Logger,
    event: str,
    *,
    level: int = logging.INFO,
    error: BaseException | None = None,
    **fields: object,
) -> None:
    """Writes one event with its fields; `error` adds its traceback."""
    logger.log(level, event, extra={"fields": fields}, exc_info=error)


LINES_AT_ONCE = 100
LINES_PER_SECOND = 1.0
REPORT_SECONDS = 10.0


class LineLimit:
    """Limits lines that callers can cause as fast as they like. For the event loop's thread.

    A hundred may come at once, and one per second in the long run. How many were left out is logged as an event of its
    own, every ten seconds while there are any.

    Args:
        logger: gets that event.
        event: its name; the field `count` says how many lines were left out.
    """

    def __init__(self, logger: logging.Logger, event: str) -> None:
        self._logger, self._event = logger, event
        self._room = float(LINES_AT_ONCE)
        self._updated = time.monotonic()
        self._left_out = 0

    def allow(self) -> bool:
        """Whether the next line may be written; if not, it is counted."""
        now = time.monotonic()
        self._room = min(self._room + (now - self._updated) * LINES_PER_SECOND, float(LINES_AT_ONCE))
        self._updated = now
        if self._room >= 1.0:
            self._room -= 1.0
            return True
        if not self._left_out:
            asyncio.get_running_loop().call_later(REPORT_SECONDS, self._report)
        self._left_out += 1
        return False

    def _report(self) -> None:
        log_event(self._logger, self._event, level=logging.WARNING, count=self._left_out)
        self._left_out = 0
