"""Errors that all ranks raise together, so that none is left waiting in a collective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from kvcore.errors import KVDistillError, OutputError
from kvcore.files import write_problem
from student_trainer.loop import ds_engine

FailTogether = Callable[[KVDistillError | None], None]


def fail_together(failure: KVDistillError | None) -> None:
    """Raises this rank's error, or an error that another rank failed. All ranks must call it."""
    failed = torch.tensor(int(failure is not None), device=ds_engine.device())
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failure is not None:
        raise failure
    if int(failed):
        raise KVDistillError("another rank failed; its message shows the reason")


@contextmanager
def shared_failure(share: FailTogether = fail_together) -> Iterator[None]:
    """Passes the error raised in the block, or None, to `share`, which raises on all ranks if any rank has one."""
    failure: KVDistillError | None = None
    try:
        yield
    except KVDistillError as error:
        failure = error
    except OSError as error:
        if (problem := write_problem(error)) is None:
            raise
        failure = OutputError(f"cannot write {error.filename or 'a file'}: {problem}")
    share(failure)
