"""The losses, each a mean over samples of a mean over that sample's own tokens or slots.

Averaging inside a sample first keeps the gradient the same however a batch is split over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from kvcore.types import Tensor

KV_LOSSES: dict[str, Callable[..., Tensor]] = {"mse": functional.mse_loss, "smooth_l1": functional.smooth_l1_loss}


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over samples of the mean cross-entropy of a sample's masked-in tokens (natural logarithm)."""
    loss_BT = functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none"
    ).view_as(targets_BT)
    counts_B = mask_BT.sum(dim=1).clamp(min=1)
    return ((loss_BT * mask_BT).sum(dim=1) / counts_B).mean()


def kv_distance(student_BLHMD: Tensor, target_BLHMD: Tensor, scale_L: Tensor, mask_BM: Tensor, kind: str) -> Tensor:
    """The KV objective of one tensor (keys or values): both sides divided by the target's per-layer deviation.

    Args:
        student_BLHMD: with gradient.
        target_BLHMD: without.
        scale_L: standard deviation of the targets, per layer.
        mask_BM: slots that hold a target; samples without any are left out of the mean.
        kind: `mse` or `smooth_l1`.

    Returns:
        scalar; 0 where no sample has a target, still attached to the graph.
    """
    scale = scale_L[None, :, None, None, None]
    loss_BLHMD = KV_LOSSES[kind](student_BLHMD / scale, target_BLHMD / scale, reduction="none")
    return _mean_over_slots(loss_BLHMD.mean(dim=(1, 2, 4)), mask_BM)


@torch.no_grad()
def normalised_error(student_BLHMD: Tensor, target_BLHMD: Tensor, variance_L: Tensor, mask_BM: Tensor) -> Tensor:
    """Squared error over the target's variance, averaged over layers: 1.0 is what predicting the mean scores."""
    error_BLHMD = (student_BLHMD - target_BLHMD).pow(2) / variance_L[None, :, None, None, None]
    return _mean_over_slots(error_BLHMD.mean(dim=(1, 2, 4)), mask_BM)


def _mean_over_slots(loss_BM: Tensor, mask_BM: Tensor) -> Tensor:
    counts_B = mask_BM.sum(dim=1)
    per_sample_B = (loss_BM * mask_BM).sum(dim=1) / counts_B.clamp(min=1)
    return per_sample_B.sum() / (counts_B > 0).sum().clamp(min=1)
