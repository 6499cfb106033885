"""Logs on stderr: JSON Lines with one object per event, or plain text on a terminal."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any

from teacher_server.config import ServeConfig


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, event, then the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record as one line; line breaks in values are escaped."""
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


class TextFormatter(logging.Formatter):
    """One line per record for people: time, level, event, and its fields as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        """Renders a record, with its traceback if it has one."""
        fields = "".join(f" {key}={value}" for key, value in getattr(record, "fields", {}).items())
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.levelname} {record.getMessage()}"
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return line + fields + trace


def configure(level: str) -> None:
    """Sends all loggers of the process to stderr; other libraries from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if sys.stderr.isatty() else JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("teacher_server", "kvcore"):
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(capture=True)


def show_banner(config: ServeConfig, grpc_port: int, http_port: int) -> None:
    """Writes the server's addresses to stderr if it is a terminal."""
    if not sys.stderr.isatty():
        return
    pages = f"http://{config.http_host}:{http_port}"
    lines = {
        "Model": f"{config.teacher_name} ({config.engine}, {config.dtype})",
        "gRPC": f"{config.grpc_host}:{grpc_port}{' (TLS)' if config.tls_cert else ''}",
        "Status page": f"{pages}/",
        "Metrics": f"{pages}/metrics",
    }
    sys.stderr.write("".join(f"  {name:<13}{text}\n" for name, text in {"kvdistill serve": "", **lines}.items()))


def log_event(
    logger: logging.Logger,
    event: str,
    *,
    level: int = logging.INFO,
    error: BaseException | None = None,
    **fields: object,
) -> None:
    """Log one event with its fields; `error` adds its traceback."""
    logger.log(level, event, extra={"fields": fields}, exc_info=error)


LINES_AT_ONCE = 100
LINES_PER_SECOND = 1.0
REPORT_SECONDS = 10.0


class LineLimit:
    """A rate limit for log lines that callers can cause. Used on the event loop's thread only.

    Allows a burst of `LINES_AT_ONCE` lines, and `LINES_PER_SECOND` in the long run. Every `REPORT_SECONDS` in which it
    suppressed lines, it logs their number as an event.

    Args:
        logger: logs that event.
        event: its name; the field `count` is the number of suppressed lines.
    """

    def __init__(self, logger: logging.Logger, event: str) -> None:
        self._logger, self._event = logger, event
        self._room = float(LINES_AT_ONCE)
        self._updated = time.monotonic()
        self._suppressed = 0

    def allow(self) -> bool:
        """Whether the next line may be logged; if not, it is counted as suppressed."""
        now = time.monotonic()
        self._room = min(self._room + (now - self._updated) * LINES_PER_SECOND, float(LINES_AT_ONCE))
        self._updated = now
        if self._room >= 1.0:
            self._room -= 1.0
            return True
        if not self._suppressed:
            asyncio.get_running_loop().call_later(REPORT_SECONDS, self._report)
        self._suppressed += 1
        return False

    def _report(self) -> None:
        log_event(self._logger, self._event, level=logging.WARNING, count=self._suppressed)
        self._suppressed = 0
