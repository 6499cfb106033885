"""Progress of a long part of a run, for the page, the terminal and the log."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from typing import TypeVar

import torch.distributed as dist
from rich.console import Console

from kvcore.monitoring.progress import Meter
from student_trainer.monitoring.run_state import current_run

logger = logging.getLogger(__name__)
BatchT = TypeVar("BatchT")


def show_progress(what: str, batches: Sequence[BatchT]) -> Generator[BatchT]:
    """Yields the batches while rank 0 shows how many are done. Long parts also go to the log if no terminal is used.

    A caller that stops before the last batch must close the generator.
    """
    run = current_run.get()
    if run is None or dist.get_rank() != 0:
        yield from batches
        return
    lines = Console(stderr=True, force_terminal=False)
    log = logger.debug if run.on_terminal else logger.info
    with Meter({what: len(batches)}, lines, brief=True, log=log) as meter:
        try:
            for number, batch in enumerate(batches):
                run.doing = f"{what} {number}/{len(batches)}"
                yield batch
                meter.advance(what)
        finally:
            run.doing = None
