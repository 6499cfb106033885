"""Several teachers' K/V, each already in the student's space, become one target."""

from __future__ import annotations

import torch

from kvcore.errors import FieldError
from kvcore.types import Tensor


def fuse_fixed(x_NBLHMD: Tensor, mask_NBM: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean of the teachers that are present at each slot, in fp32.

    Only K/V that each teacher's own adapter has brought into one basis may be averaged.

    Args:
        x_NBLHMD: keys or values.
        mask_NBM: True where a teacher has a token in the slot; what stands elsewhere is never read.
        weights_N: above 0; need not sum to 1. At each slot they are normalised over the teachers present.

    Returns:
        fused_BLHMD and mask_BM, True where at least one teacher was present; zeros elsewhere.

    Raises:
        FieldError: a weight that is not finite and above 0, or not one weight per teacher.
    """
    if weights_N.shape != x_NBLHMD.shape[:1]:
        raise FieldError("weights", f"need one per teacher ({len(x_NBLHMD)}); got {list(weights_N.shape)}")
    if not bool((torch.isfinite(weights_N) & (weights_N > 0)).all()):
        raise FieldError("weights", f"must be finite and above 0; got {weights_N.tolist()}")
    present_NBM = mask_NBM * weights_N.to(mask_NBM.device, torch.float32)[:, None, None]
    mask_BM = mask_NBM.any(dim=0)
    share_NBM = present_NBM / present_NBM.sum(dim=0).masked_fill(~mask_BM, 1.0)
    fused = x_NBLHMD.new_zeros(x_NBLHMD.shape[1:], dtype=torch.float32)
    for x_BLHMD, slots_BM, share_BM in zip(x_NBLHMD, mask_NBM, share_NBM, strict=True):
        # An empty slot may hold anything, NaN too, which a weight of 0 would let through.
        kept = x_BLHMD.float().masked_fill(~slots_BM[:, None, None, :, None], 0.0)
        fused = fused + kept * share_BM[:, None, None, :, None]
    return fused, mask_BM
