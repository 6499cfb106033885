"""The trainer's engine without DeepSpeed: plain AdamW in one process, with the same interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from kvcore.types import Tensor
from student_trainer.config import TrainConfig
from student_trainer.loop.ds_engine import MOMENTS, Engine


class PlainEngine(Engine):
    """Has no moments before its first step, like DeepSpeed's engine with every ZeRO stage."""

    def __init__(self, module: nn.Module, config: TrainConfig, accumulation: int) -> None:
        self.module = module
        self._accumulation, self._micro_steps = accumulation, 0
        self._clip = config.optim.max_grad_norm
        self._optimizer = torch.optim.AdamW(
            [p for _, p in self.trained_parameters()],
            lr=config.optim.lr,
            weight_decay=config.optim.weight_decay,
        )

    def micro_step(self, batch: Any) -> dict[str, Tensor]:
        losses = self.module(batch)
        (losses["loss"] / self._accumulation).backward()
        self._micro_steps += 1
        if self._micro_steps % self._accumulation == 0:
            self._norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._clip))
            self._optimizer.step()
            self._optimizer.zero_grad()
        return losses

    def gradient_norm(self) -> float:
        return self._norm

    def _inner(self) -> torch.optim.Optimizer:
        return self._optimizer

    def _held(self) -> Iterator[Tensor]:
        return (parameter for _, parameter in self.trained_parameters())

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.trained_parameters()}

    def moments(self) -> dict[str, Tensor]:
        state = self._optimizer.state
        return {f"{name}/{m}": state[p][m].clone() for name, p in self.trained_parameters() for m in MOMENTS}

    def restore(self, weight: Callable[[str], Tensor], moment: Callable[[str], Tensor], steps: int) -> None:
        for name, parameter in self.trained_parameters():
            parameter.data.copy_(weight(name))
            self._optimizer.state[parameter] = {"step": torch.tensor(float(steps))} | {
                m: moment(f"{name}/{m}") for m in MOMENTS
            }
