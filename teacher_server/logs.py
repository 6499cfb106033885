"""Logs as JSON Lines on stderr: one object per event, made for machines and still greppable by people."""

from __future__ import annotations

import json
import logging
import sys
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
