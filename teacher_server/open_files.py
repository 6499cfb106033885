"""The limit of open files, which includes connections."""

from __future__ import annotations

import logging
import resource

from kvcore.monitoring.http_server import MAX_CONNECTIONS as MAX_HTTP_CONNECTIONS
from kvcore.wire.channel_arguments import MAX_CONNECTIONS as MAX_GRPC_CONNECTIONS
from teacher_server.monitoring.logs import log_event

log = logging.getLogger(__name__)

# Asyncio accepts some HTTP connections before the closed ones are gone. The rest is for the model and the engine.
NEEDED = MAX_GRPC_CONNECTIONS + 3 * MAX_HTTP_CONNECTIONS + 128
WANTED = 65_536


def raise_limit() -> None:
    """Raise this process's limit as far as the system allows, and warn if connections alone may reach it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < possible:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    if possible < NEEDED:
        log_event(log, "few_open_files", level=logging.WARNING, limit=possible, needed=NEEDED)
