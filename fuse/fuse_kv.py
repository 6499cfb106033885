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
    normalised over the teachers present there. A slot is present if a teacher with a weight above 0 in some layer has a
    token in it. If weights differ by layer and a present slot has no token of a teacher with weight in this layer, the
    teachers that have weight in other layers are used, with their summed weights: every layer of a target has K/V of a
    teacher, or the slot is masked.

    Differentiable in `x_NBLHMD` and `weights`, also at a weight of 0.

    Args:
        x_NBLHMD: keys or values.
        mask_NBM: True where a teacher has a token in the slot; other slots are never read and may hold NaN.
        weights: [N], [B,N] or [B,L,N]; need not sum to 1. [N] are settings and must be above 0; the others may be 0,
            and count as 0 below 1e-20. NaN among the others, from a diverged model, makes the sample's target NaN, so
            that all ranks detect it in the loss.

    Returns:
        fused_BLHMD and mask_BM, True where a teacher is present; zeros elsewhere.

    Raises:
        FieldError: weights have another shape or are negative; or one of [N] is not finite or counts as 0.
    """
    _check(x_NBLHMD, weights)
    dtype = torch.promote_types(x_NBLHMD.dtype, torch.float32)
    share_NBLM, mask_BM = _shares(mask_NBM, weights.to(mask_NBM.device, dtype), x_NBLHMD.shape[2])
    fused_BLHMD = x_NBLHMD.new_zeros(x_NBLHMD.shape[1:], dtype=dtype)
    for x_BLHMD, slots_BM, share_BLM in zip(x_NBLHMD, mask_NBM, share_NBLM, strict=True):
        # An empty slot may hold NaN, and NaN times a share of 0 is NaN.
        kept_BLHMD = x_BLHMD.to(dtype).masked_fill(~slots_BM[:, None, None, :, None], 0.0)
        fused_BLHMD = fused_BLHMD + kept_BLHMD * share_BLM[:, :, None, :, None]
    return fused_BLHMD, mask_BM


def _shares(mask_NBM: Tensor, weights: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Each teacher's share of each slot [N,B,L,M], 0 where no teacher is present; and the present slots [B,M]."""
    # Subtracted instead of replaced, so that a straight-through weight of 0 keeps its gradient.
    weights = weights - weights.detach().where(weights <= LEAST_WEIGHT, 0.0)
    weights_NBL = _by_layer(weights, mask_NBM.shape[1], layers)
    own_NBLM = weights_NBL[..., None] * mask_NBM[:, :, None]
    of_any_layer_NBLM = own_NBLM.sum(dim=2, keepdim=True)
    present_NBLM = torch.where(own_NBLM.sum(dim=0) > 0, own_NBLM, of_any_layer_NBLM)
    total_BLM = present_NBLM.sum(dim=0)
    empty_BLM = total_BLM <= 0
    share_NBLM = (present_NBLM / total_BLM.masked_fill(empty_BLM, 1.0)).masked_fill(empty_BLM, 0.0)
    return share_NBLM, ~empty_BLM[:, 0]


def _by_layer(weights: Tensor, batch: int, layers: int) -> Tensor:
    """Expands [N], [B,N] or [B,L,N] to [N,B,L]."""
    weights_BN = weights.expand(batch, -1) if weights.dim() == 1 else weights
    weights_BLN = weights_BN[:, None].expand(-1, layers, -1) if weights_BN.dim() == 2 else weights_BN
    return weights_BLN.movedim(-1, 0)


def _check(x_NBLHMD: Tensor, weights: Tensor) -> None:
    teachers, batch, layers = x_NBLHMD.shape[:3]
    shapes = ([teachers], [batch, teachers], [batch, layers, teachers])
    if list(weights.shape) not in shapes:
        raise FieldError("weights", f"must be one of {', '.join(map(str, shapes))} in shape; got {list(weights.shape)}")
    fixed = weights.dim() == 1
    bad = ~(torch.isfinite(weights) & (weights > LEAST_WEIGHT)) if fixed else weights < 0
    if bool(bad.any()):
        limit = f"finite and above {LEAST_WEIGHT}" if fixed else "not below 0"
        raise FieldError("weights", f"must be {limit}; got {weights.detach()[bad].flatten()[:4].tolist()}")
