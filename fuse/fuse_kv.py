"""Fuses the K/V of several teachers, each aligned to the student's space, into one target."""

from __future__ import annotations

import torch

from kvcore.errors import FieldError
from kvcore.types import Tensor

# A softmax weight below this counts as 0; dividing by it would overflow the gradients.
LEAST_WEIGHT = 1e-20


def fuse(x_NBLHMD: Tensor, mask_NBM: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean of the teachers that are present at each slot, in at least fp32.

    Only average K/V that each teacher's own adapter has mapped to the same basis. At each slot the weights are
    normalised over the teachers present there. A slot is present if a teacher with a weight above 0 has a token in it.

    Differentiable in `x_NBLHMD` and `weights`, also at a weight of 0.

    Args:
        x_NBLHMD: keys or values.
        mask_NBM: True where a teacher has a token in the slot; other slots are never read and may hold NaN.
        weights: [N] or [B,N]; need not sum to 1. [N] are settings and must be above 0; the others may be 0, and count
            as 0 below 1e-20. NaN among the others, from a diverged model, makes the sample's target NaN, so that all
            ranks detect it in the loss.

    Returns:
        fused_BLHMD and mask_BM, True where a teacher is present; zeros elsewhere.

    Raises:
        FieldError: weights have another shape or are negative; or one of [N] is not finite or counts as 0.
    """
    _check(x_NBLHMD, weights)
    dtype = torch.promote_types(x_NBLHMD.dtype, torch.float32)
    share_NBM, mask_BM = _shares(mask_NBM, weights.to(mask_NBM.device, dtype))
    fused_BLHMD = x_NBLHMD.new_zeros(x_NBLHMD.shape[1:], dtype=dtype)
    for x_BLHMD, slots_BM, share_BM in zip(x_NBLHMD, mask_NBM, share_NBM, strict=True):
        # An empty slot may hold NaN, and NaN times a share of 0 is NaN.
        kept_BLHMD = x_BLHMD.to(dtype).masked_fill(~slots_BM[:, None, None, :, None], 0.0)
        fused_BLHMD = fused_BLHMD + kept_BLHMD * share_BM[:, None, None, :, None]
    return fused_BLHMD, mask_BM


def _shares(mask_NBM: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each teacher's share of each slot [N,B,M], 0 where no teacher is present; and the present slots [B,M]."""
    # Subtracted instead of replaced, so that a straight-through weight of 0 keeps its gradient.
    weights = weights - weights.detach().where(weights <= LEAST_WEIGHT, 0.0)
    weights_NB = weights.expand(mask_NBM.shape[1], -1).T
    own_NBM = weights_NB[..., None] * mask_NBM
    total_BM = own_NBM.sum(dim=0)
    empty_BM = total_BM <= 0
    share_NBM = (own_NBM / total_BM.masked_fill(empty_BM, 1.0)).masked_fill(empty_BM, 0.0)
    return share_NBM, ~empty_BM


def _check(x_NBLHMD: Tensor, weights: Tensor) -> None:
    teachers, batch = x_NBLHMD.shape[:2]
    if list(weights.shape) not in ([teachers], [batch, teachers]):
        expected = f"[{teachers}] or [{batch}, {teachers}]"
        raise FieldError("weights", f"must be {expected} in shape; got {list(weights.shape)}")
    fixed = weights.dim() == 1
    bad = ~(torch.isfinite(weights) & (weights > LEAST_WEIGHT)) if fixed else weights < 0
    if bool(bad.any()):
        limit = f"finite and above {LEAST_WEIGHT}" if fixed else "not below 0"
        raise FieldError("weights", f"must be {limit}; got {weights.detach()[bad].flatten()[:4].tolist()}")
