"""Measures the parts of a training step from outside, through torch's global hooks.

The trainer logs how long it waits for K/V, decodes and aligns them. This adds forward and backward pass and optimiser.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from experiments.real.real_config import SKIPPED_STEPS


@dataclass(slots=True)
class StepTimes:
    """Seconds of each optimiser step, by part.

    `passes`: the forward passes of the language model's body. `ends`: when the optimiser's step ended. `cpu_ends`: the
    CPU time of all threads of this process by then.
    """

    forward: list[float] = field(default_factory=list)
    passes: list[list[float]] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    cpu_ends: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        """The median of each part."""
        parts = {"forward": self.forward, "backward": self.backward, "optimizer": self.optimizer}
        return {name: statistics.median(_settled(values)) for name, values in parts.items() if values}

    def median_passes(self) -> list[float]:
        """The median of each forward pass of the body within a step."""
        return [statistics.median(values) for values in zip(*_settled(self.passes), strict=False)]


def _settled(values: list[Any]) -> list[Any]:
    """All but the first steps, in which memory is allocated."""
    return values[SKIPPED_STEPS:] or values


class StepClock:
    """Context manager that times the steps of one module, on a GPU as well.

    With several micro-batches per step only the last one is measured. Backward includes the exchange between ranks.

    Args:
        model: the class of the module whose forward pass returns the loss, or several of which one is used.
        bodies: the classes of language models' bodies, whose passes within it are timed apart.
    """

    def __init__(self, model: type[nn.Module] | tuple[type[nn.Module], ...], *bodies: type[nn.Module]) -> None:
        self.times = StepTimes()
        self._model, self._bodies = model, bodies
        self._began = self._forward = self._ended = self._pass_began = self._step_began = 0.0
        self._passes: list[float] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [
            module_hooks.register_module_forward_pre_hook(self._before_forward),
            module_hooks.register_module_forward_hook(self._after_forward),
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, module: nn.Module, _inputs: Any) -> None:
        if isinstance(module, self._model):
            self._began, self._passes = _now(), []
        elif isinstance(module, self._bodies):
            self._pass_began = _now()

    def _after_forward(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        if isinstance(module, self._model):
            self._ended = _now()
            self._forward = self._ended - self._began
        elif isinstance(module, self._bodies):
            self._passes.append(_now() - self._pass_began)

    def _before_step(self, _optimizer: Any, _arguments: Any, _keywords: Any) -> None:
        self._step_began = _now()
        self.times.forward.append(self._forward)
        self.times.passes.append(self._passes)
        self.times.backward.append(self._step_began - self._ended)

    def _after_step(self, _optimizer: Any, _arguments: Any, _keywords: Any) -> None:
        self.times.ends.append(_now())
        self.times.cpu_ends.append(time.process_time())
        self.times.optimizer.append(self.times.ends[-1] - self._step_began)


def _now() -> float:
    """The time after the device has finished all submitted work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
