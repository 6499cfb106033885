"""Tests of the optimiser's steps in DeepSpeed's engine on one rank."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kvcore.types import Tensor
from student_trainer.loop.ds_engine import Engine
from tests.support.training_parts import train_config

# DeepSpeed scripts a function when it is imported.
pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

STEPS, LR, DECAY = 4, 1e-2, 0.1


class Regression(nn.Module):
    """Predicts random targets; the batch is the seed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(37, 11)

    def forward(self, seed: int) -> dict[str, Tensor]:
        dtype = self.map.weight.dtype
        x, y = torch.randn(8, 48, generator=torch.Generator().manual_seed(seed)).to(dtype).split([37, 11], dim=1)
        return {"loss": (self.map(x) - y).square().mean()}


def engine_of(stage: int) -> Engine:
    # Without clipping.
    optim = {"lr": LR, "weight_decay": DECAY, "max_grad_norm": 1e9}
    run = {"global_batch": 1, "micro_batch": 1, "zero_stage": stage}
    return Engine(Regression().train(), train_config(optim=optim, run=run), accumulation=1)


def naive_weights(steps: int) -> list[Tensor]:
    """AdamW as in arXiv 1711.05101, in fp64."""
    model = Regression().double()
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for step in range(1, steps + 1):
        model.zero_grad()
        model(step)["loss"].backward()
        for parameter, (first, second) in zip(model.parameters(), moments, strict=True):
            assert parameter.grad is not None
            first.mul_(0.9).add_(0.1 * parameter.grad)
            second.mul_(0.999).add_(0.001 * parameter.grad**2)
            ahead = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            parameter.data -= LR * ahead + LR * DECAY * parameter.data
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("stage", [0, 2])
def test_steps_are_those_of_adamw_also_after_a_restore(stage: int) -> None:
    engine = engine_of(stage)
    for step in range(1, STEPS):
        engine.micro_step(step)
    weights, moments = copy.deepcopy((engine.weights(), engine.moments()))
    engine.close()
    resumed = engine_of(stage)
    for name, parameter in resumed.trained_parameters():
        parameter.data.copy_(weights[name])
    resumed.restore(weights.__getitem__, moments.__getitem__, STEPS - 1)
    resumed.micro_step(STEPS)
    for found, expected in zip(resumed.weights().values(), naive_weights(STEPS), strict=True):
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)
    resumed.close()


def test_a_step_of_the_optimizer_reads_each_parameter_once() -> None:
    engine = engine_of(0)
    assert all(group["fused"] for group in engine._inner().param_groups)
    engine.close()
