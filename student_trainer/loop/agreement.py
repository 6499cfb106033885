"""The common decision of all ranks before each micro-batch and each save: continue, stop, or fail."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from kvcore.errors import KVDistillError
from student_trainer.loop.divergence import DivergedError, FiniteCheck

# A rank's status. Where ranks differ, the highest holds for all.
OK, STOP, FAILED, DIVERGED = range(4)


class Agreement:
    """One rank's part in the agreement.

    Args:
        device: of this rank.
        checkpoints: the run's directory of checkpoints, which the error of a diverged run names.
    """

    def __init__(self, device: torch.device, checkpoints: Path) -> None:
        self.finite = FiniteCheck()
        self.stop_requested = False
        self._device, self._checkpoints = device, checkpoints
        # Through the hosts: an NCCL collective would wait for the device before every micro-batch.
        self._hosts = dist.new_group(backend="gloo") if device.type == "cuda" else None

    def reach(self, failure: KVDistillError | None) -> int:
        """The highest status of any rank, in one small collective: OK, STOP or FAILED. All ranks must call it.

        Raises:
            DivergedError: on every rank, if any rank saw a value that is not finite. Nothing may be saved then.
        """
        own = DIVERGED if self.finite.failed else FAILED if failure else STOP if self.stop_requested else OK
        status = torch.tensor(own)
        dist.all_reduce(status, op=dist.ReduceOp.MAX, group=self._hosts)
        if int(status) == DIVERGED:
            raise DivergedError(*self.finite.agreed(self._device), self._checkpoints)
        return int(status)
