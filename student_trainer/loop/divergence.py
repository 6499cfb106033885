"""Ends a run with values that are not finite: on all ranks, and before anything is saved."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from kvcore.errors import KVDistillError
from student_trainer.loop import checkpoint

GRADIENT_NORM, STATE = "gradient norm", "parameters or optimizer moments"


class DivergedError(KVDistillError):
    """Losses, gradients or parameters became NaN or infinite.

    Args:
        step: the optimiser step, as logged.
        names: what is not finite.
        checkpoints: the run's directory of checkpoints; the newest is from before the divergence.
    """

    next_step = (
        "if it diverges again, start over in another run.output_dir with a lower optim.lr, a lower loss.kv_weight, or "
        "student.dtype=fp32"
    )

    def __init__(self, step: int, names: Collection[str], checkpoints: Path) -> None:
        kept = checkpoint.latest(checkpoints)
        last = f"the same command resumes from {kept.path}" if kept else "no checkpoint was saved before that"
        super().__init__(f"step {step}: the run diverged; not finite: {', '.join(names)}; {last}")


class FiniteCheck:
    """Collects this rank's values that are not finite, until all ranks agree to stop."""

    def __init__(self) -> None:
        self._losses: set[str] = set()
        self._found: set[str] = set()
        self._step = 0

    @property
    def failed(self) -> bool:
        """Whether this rank saw a value that is not finite."""
        return bool(self._found)

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Checks values of one step: sums of losses (the same names on all ranks), `GRADIENT_NORM` or `STATE`."""
        self._losses |= values.keys() - {GRADIENT_NORM, STATE}
        self._found |= not_finite(values)
        if self._found and not self._step:
            self._step = step

    def agreed(self, device: torch.device) -> tuple[int, list[str]]:
        """The step, and the names of all ranks' values that are not finite. All ranks must call it."""
        names = [*sorted(self._losses), GRADIENT_NORM, STATE]
        seen = torch.tensor([self._step, *(int(name in self._found) for name in names)], device=device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        step, *flags = seen.tolist()
        return step, [name for name, flag in zip(names, flags, strict=True) if flag]


def not_finite(values: Mapping[str, float]) -> set[str]:
    """The names of the values that are NaN or infinite."""
    return {name for name, value in values.items() if not math.isfinite(value)}
