"""How far a long part of a run is: for the page, the terminal and the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist
from rich.console import Console

from kvcore.monitoring.progress import Meter
from student_trainer.monitoring.run_state import current_run

logger = logging.getLogger(__name__)
BatchT = TypeVar("BatchT")


def watched(what: str, batches: Sequence[BatchT]) -> Iterator[BatchT]:
    """Passes batches on. Rank 0 shows how many are done; in the log only if it takes long and no terminal shows it."""
    run = current_run.get()
    if run is None or dist.get_rank() != 0:
        yield from batches
        return
    lines = Console(stderr=True, force_terminal=False)
    say = logger.debug if run.drawn else logger.info
    with Meter({what: len(batches)}, lines, brief=True, log=say) as meter:
        try:
            for number, batch in enumerate(batches):
                run.doing = f"{what} {number}/{len(batches)}"
                yield batch
                meter.advance(what)
        finally:
            run.doing = None
