"""The losses. Unless documented otherwise, each is a mean over samples of the mean over a sample's tokens or slots.

Averaging within a sample first makes the gradient independent of how a batch is split over ranks and micro-batches.
Masked-out K/V slots may hold anything, NaN included: they affect neither a value nor a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType

import torch
from torch.nn import functional

from kvcore.types import Tensor
from student_trainer.method_config import KV_LOSSES

# Takes student and target [B,L,H,M,D], both divided by the scale of `kv_distance` and 0 in empty slots, and the mask
# [B,M] of slots with a target. Returns a scalar. The target has no gradient.
KVLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def mean_over_tokens(loss_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over samples of the mean of a sample's masked-in tokens. `loss_BT` must be finite where masked out."""
    counts_B = mask_BT.sum(dim=1).clamp(min=1)
    return ((loss_BT * mask_BT).sum(dim=1) / counts_B).mean()


def codi_loss(student_hidden_BSE: Tensor, teacher_hidden_BSE: Tensor) -> Tensor:
    """CODI's distillation of hidden states at the token before the answer (arXiv 2502.21074).

    Mean over layers of smooth L1(student, teacher) / std(teacher), both over all samples and features of a layer. So
    the loss, not the states, is in units of the deviation. The deviation is that of the micro-batch, as in CODI: unlike
    the cross-entropy, the loss depends on how a batch is split.

    Args:
        student_hidden_BSE: S layers' hidden states of E features, after the latents.
        teacher_hidden_BSE: the same after the reasoning as text; a constant here, trained by its own cross-entropy.

    Returns:
        scalar; infinite if a layer's teacher states are all equal.
    """
    student, teacher = _at_least_fp32(student_hidden_BSE), _at_least_fp32(teacher_hidden_BSE.detach())
    loss_S = functional.smooth_l1_loss(student, teacher, reduction="none").mean(dim=(0, 2))
    return (loss_S / teacher.std(dim=(0, 2))).mean()


def kv_distance(student_BLHMD: Tensor, target_BLHMD: Tensor, scale_L: Tensor, mask_BM: Tensor, kind: str) -> Tensor:
    """The KV objective of one tensor (keys or values): both sides divided by a scale per layer.

    `mse` and `smooth_l1` are per element, `cosine` is 1 - cosine over D per head and slot (the cosine of a zero vector
    is 0), all averaged over layers and heads. `cka` is 1 - linear CKA (arXiv 1905.00414) per layer, with all the
    batch's slots as centred rows of H x D features, averaged over layers: it compares the similarities between slots,
    whatever their rotation. A layer with fewer than two slots, or with a constant side, adds 0. Unlike the others
    `cka` depends on how a batch is split into micro-batches, and with far fewer slots than features it is near 0 for
    any pair.

    Args:
        student_BLHMD: with gradient.
        target_BLHMD: a constant; no gradient reaches it.
        scale_L: standard deviation of the targets, per layer, or 1; it does not affect `cosine` and `cka`.
        mask_BM: slots with a target; samples without any are left out of the mean.
        kind: a name in `KV_LOSSES`.

    Returns:
        scalar; 0 if no sample has a target, still attached to the graph.
    """
    scale = scale_L[None, :, None, None, None]
    student = _only_masked_in(student_BLHMD, mask_BM) / scale
    target = _only_masked_in(target_BLHMD.detach(), mask_BM) / scale
    return KV_LOSSES.load(kind, FunctionType)(student, target, mask_BM)


@torch.no_grad()
def error_by_layer_and_head(student_BLHMD: Tensor, target_BLHMD: Tensor, variance_L: Tensor, mask_BM: Tensor) -> Tensor:
    """Squared error divided by the variance of the target's layer, [L,H]; 0 if no sample has a target.

    Its mean is the normalised error. Predicting the mean gives 1.0 on average over a layer's heads, and less for a head
    that varies less than the others.
    """
    return _mean_over_slots(_error(student_BLHMD, target_BLHMD, variance_L, mask_BM), mask_BM)


@torch.no_grad()
def error_by_slot(student_BLHMD: Tensor, target_BLHMD: Tensor, variance_L: Tensor, mask_BM: Tensor) -> Tensor:
    """The same error of each slot, [B,M]: the mean over layers and heads; 0 in empty slots."""
    return _error(student_BLHMD, target_BLHMD, variance_L, mask_BM).mean(dim=(1, 2))


def _error(student_BLHMD: Tensor, target_BLHMD: Tensor, variance_L: Tensor, mask_BM: Tensor) -> Tensor:
    student, target = _only_masked_in(student_BLHMD, mask_BM), _only_masked_in(target_BLHMD, mask_BM)
    return (student - target).pow(2).mean(dim=-1) / variance_L[None, :, None, None]


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _only_masked_in(x_BLHMD: Tensor, mask_BM: Tensor) -> Tensor:
    # Before any arithmetic: NaN times 0 is NaN, forward and backward.
    return _at_least_fp32(x_BLHMD.masked_fill(~mask_BM[:, None, None, :, None], 0.0))


def _mean_over_slots(loss_BLHM: Tensor, mask_BM: Tensor) -> Tensor:
    """[L,H]: mean over samples of the mean over a sample's masked-in slots."""
    counts_B = mask_BM.sum(dim=1)
    per_sample_BLH = (loss_BLHM * mask_BM[:, None, None]).sum(dim=3) / counts_B.clamp(min=1)[:, None, None]
    return per_sample_BLH.sum(dim=0) / (counts_B > 0).sum().clamp(min=1)


def per_slot(distance: Callable[[Tensor, Tensor], Tensor]) -> KVLoss:
    """Makes a KV loss from a distance between slots.

    Args:
        distance: maps student and target [B,L,H,M,D] to [B,L,H,M].

    Returns:
        a loss: the mean over a sample's slots, then over samples, layers and heads.
    """

    @functools.wraps(distance)
    def loss(student_BLHMD: Tensor, target_BLHMD: Tensor, mask_BM: Tensor) -> Tensor:
        return _mean_over_slots(distance(student_BLHMD, target_BLHMD), mask_BM).mean()

    return loss


@per_slot
def mse(x_BLHMD: Tensor, y_BLHMD: Tensor) -> Tensor:
    """Squared difference."""
    return functional.mse_loss(x_BLHMD, y_BLHMD, reduction="none").mean(dim=-1)


@per_slot
def smooth_l1(x_BLHMD: Tensor, y_BLHMD: Tensor) -> Tensor:
    """Squared difference below 1, absolute difference above."""
    return functional.smooth_l1_loss(x_BLHMD, y_BLHMD, reduction="none").mean(dim=-1)


@per_slot
def cosine(x_BLHMD: Tensor, y_BLHMD: Tensor) -> Tensor:
    """1 - cosine."""
    dot, xx, yy = ((a * b).sum(dim=-1) for a, b in ((x_BLHMD, y_BLHMD), (x_BLHMD, x_BLHMD), (y_BLHMD, y_BLHMD)))
    return 1 - _correlation(dot, xx, yy)


def cka(student_BLHMD: Tensor, target_BLHMD: Tensor, mask_BM: Tensor) -> Tensor:
    """1 - linear CKA of each layer's slots."""
    return _cka_distance(_slots_as_rows(student_BLHMD, mask_BM), _slots_as_rows(target_BLHMD, mask_BM))


def _correlation(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """`xy / sqrt(xx yy)`; 0 with a gradient of 0 where either side has length 0."""
    defined = (xx > 0) & (yy > 0)
    x_length, y_length = (torch.where(defined, square, 1.0).sqrt() for square in (xx, yy))
    return torch.where(defined, xy, 0.0) / x_length / y_length


def _slots_as_rows(x_BLHMD: Tensor, mask_BM: Tensor) -> Tensor:
    """x_LNF: the N masked-in slots of all samples, centred."""
    x_NLHD = x_BLHMD.permute(0, 3, 1, 2, 4)[mask_BM]
    x_LNF = x_NLHD.flatten(2).transpose(0, 1)
    # Relative to the first row, equal rows are exactly 0; their distance to a rounded mean is not.
    x_LNF = x_LNF - x_LNF[:, :1].detach()
    return x_LNF - x_LNF.sum(dim=1, keepdim=True) / max(1, x_LNF.shape[1])


def _cka_distance(x_LNF: Tensor, y_LNF: Tensor) -> Tensor:
    """Mean over layers of 1 - linear CKA of centred rows, from the smaller of the NxN and FxF matrices."""
    if x_LNF.shape[1] < x_LNF.shape[2]:
        x_LNN, y_LNN = x_LNF @ x_LNF.mT, y_LNF @ y_LNF.mT
        xy_L, xx_L, yy_L = (_inner(a, b) for a, b in ((x_LNN, y_LNN), (x_LNN, x_LNN), (y_LNN, y_LNN)))
    else:
        xy_L, xx_L, yy_L = (_inner(a_LFF, a_LFF) for a_LFF in (x_LNF.mT @ y_LNF, x_LNF.mT @ x_LNF, y_LNF.mT @ y_LNF))
    return torch.where((xx_L > 0) & (yy_L > 0), 1 - _correlation(xy_L, xx_L, yy_L), 0.0).mean()


def _inner(a_LXY: Tensor, b_LXY: Tensor) -> Tensor:
    return (a_LXY * b_LXY).sum(dim=(1, 2))
