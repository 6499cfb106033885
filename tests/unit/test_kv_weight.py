"""Tests of the automatic KV weight, on a module with known gradients and on the trained model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from kvcore.errors import FieldError
from kvcore.types import Tensor
from student_trainer.loop.calibrate import calibrate
from student_trainer.loop.kv_weight import auto_kv_weight
from student_trainer.model.distill_model import DistillModel
from tests.support.training_parts import RECORDS, distill_model, fetch_for, one_rank, train_batch

Batch = tuple[float, float]


class Linear(nn.Module):
    """Losses linear in its parameters: batch (c, k) gives `shared` the gradients c (3, 4) and k (0, 2).

    Only the cross-entropy depends on `head`, only the KV loss on `regressor`, both on `frozen`, and none on `unused`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head, self.regressor, self.frozen, self.unused = (
            nn.Parameter(torch.tensor([0.5, -1.0])) for _ in range(5)
        )
        self.frozen.requires_grad_(False)
        self.dropout = nn.Dropout(0.5).eval()
        self.modes: list[bool] = []

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        ce, kv = batch
        self.modes.append(self.training and self.dropout.training)
        self.dropout(torch.ones(3))
        reached = self.shared * self.frozen.exp().detach() / self.frozen.exp()
        return {
            "ce_loss": ce * (torch.tensor([3.0, 4.0]) * reached + 100 * self.head).sum() + 7,
            "kv_objective": kv * (torch.tensor([0.0, 2.0]) * reached + 100 * self.regressor).sum(),
        }


def reduce_over_one_rank(_: Tensor) -> None:
    """All-reduce over a single rank: no change."""


@pytest.mark.parametrize(
    ("batches", "ratio", "expected"),
    [
        ([(1.0, 1.0)], 1.0, 5 / 2),
        ([(1.0, 1.0)], 0.1, 0.1 * 5 / 2),
        ([(1.0, 0.01)], 1.0, 5 / 0.02),
        # Mean norms, independent of direction: 5 and 15 against 2 and 6.
        ([(1.0, 1.0), (-3.0, 3.0)], 1.0, 20 / 8),
        # A micro-batch without K/V counts with norm 0.
        ([(1.0, 1.0), (2.0, 0.0)], 1.0, 15 / 2),
    ],
)
def test_weighted_kv_gradient_norm_is_ratio_times_the_cross_entropy_norm(
    batches: list[Batch], ratio: float, expected: float
) -> None:
    assert auto_kv_weight(Linear(), batches, ratio, reduce_over_one_rank) == pytest.approx(expected, rel=1e-6)


def test_every_rank_gets_the_weight_over_the_batches_of_all_ranks() -> None:
    shares: list[list[Batch]] = [[(1.0, 1.0), (2.0, 0.5)], [(4.0, 0.25)], []]
    sums: list[Tensor] = []
    for share in shares[:2]:
        auto_kv_weight(Linear(), share, 1.0, lambda mine: sums.append(mine.clone()))

    def over_ranks(mine: Tensor) -> None:
        mine.copy_(torch.stack(sums).sum(dim=0))

    together = auto_kv_weight(Linear(), [batch for share in shares for batch in share], 1.0, reduce_over_one_rank)
    assert [auto_kv_weight(Linear(), share, 1.0, over_ranks) for share in shares] == pytest.approx([together] * 3)


@pytest.mark.parametrize("batches", [[(1.0, 1.0)], [(1.0, 0.0)]])
def test_the_model_is_not_changed(batches: list[Batch]) -> None:
    model = Linear()
    weights, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    try:
        auto_kv_weight(model, batches, 1.0, reduce_over_one_rank)
    except FieldError:
        assert batches == [(1.0, 0.0)]
    assert model.modes == [True]
    assert model.training
    assert not model.dropout.training
    assert all(p.grad is None for p in model.parameters())
    assert all(a.equal(b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("batches", "who"),
    [
        ([(1.0, 0.0)], "the gradient of the KV loss has the norm 0.0"),
        ([], "the gradient of the KV loss has the norm 0.0"),
        ([(1.0, 1.0), (1.0, math.nan)], "the gradient of the KV loss has the norm nan"),
        ([(0.0, 1.0)], "the gradient of the cross-entropy has the norm 0.0"),
        ([(math.inf, 1.0)], "the gradient of the cross-entropy has the norm inf"),
    ],
)
def test_zero_or_infinite_gradients_are_refused_by_name(batches: Sequence[Batch], who: str) -> None:
    with pytest.raises(FieldError, match=f"^loss.kv_weight: 'auto' .*{who}"):
        auto_kv_weight(Linear(), batches, 1.0, reduce_over_one_rank)


def test_a_kv_loss_without_gradient_for_the_student_is_refused() -> None:
    model = Linear()
    model.shared.requires_grad_(False)
    with pytest.raises(FieldError, match=r"the gradient of the KV loss has the norm 0\.0"):
        auto_kv_weight(model, [(1.0, 1.0)], 1.0, reduce_over_one_rank)


def test_norms_of_half_precision_gradients_do_not_overflow() -> None:
    model = Linear().to(torch.bfloat16)
    assert auto_kv_weight(model, [(1e25, 1e22)], 1.0, reduce_over_one_rank) == pytest.approx(2.5e3, rel=0.02)


def calibrated(mode: str, direction: str) -> DistillModel:
    model = distill_model({"ada": 1.0}, mode=mode, direction=direction)
    with one_rank():
        calibrate(model, RECORDS[:40], range(40), fetch_for(model, None), 40, lambda _: None)
    return model


def gradient_norm(model: DistillModel, loss: Tensor, other: Tensor) -> float:
    """Gradient norm of `loss` over the parameters that `other` has a gradient for too."""
    other.backward(retain_graph=True)
    reached = [p for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss.backward(retain_graph=True)
    squares = [float(p.grad.double().square().sum()) for p in reached if p.grad is not None]
    model.zero_grad()
    assert len(squares) > 10
    return math.sqrt(sum(squares))


@pytest.mark.parametrize(("mode", "direction"), [("latent", "to_student"), ("token", "to_teacher")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_weight_of_the_trained_model_matches_its_gradient_norms(
    mode: str, direction: str, *, checkpointing: bool
) -> None:
    model = calibrated(mode, direction).eval()
    batch = train_batch(model, RECORDS[40:44], 3 if mode == "latent" else None)
    losses = model.train()(batch)
    ce, kv = (
        gradient_norm(model, losses[a], losses[b])
        for a, b in (("ce_loss", "kv_objective"), ("kv_objective", "ce_loss"))
    )
    if checkpointing:
        model.student.lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert auto_kv_weight(model.eval(), [batch, batch], 0.5, reduce_over_one_rank) == pytest.approx(
        0.5 * ce / kv, rel=1e-4
    )
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
