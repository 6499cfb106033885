"""Similarity of each teacher's K/V to the student's own K/V of the same text."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from kvcore.errors import FieldError
from kvcore.types import Tensor

Metric = Literal["cosine", "dot", "euclidean"]


def teacher_similarity(student_NBLHMD: Tensor, teacher_NBLHMD: Tensor, mask: Tensor, metric: Metric) -> Tensor:
    """One number per sample and teacher, in at least fp32: higher is more similar.

    The mean over layers of a number over all features (heads times dims) of the slots that the mask selects: `cosine`
    of the two as one long vector, 0 if one of them is zero; `dot`, the mean product per feature; `euclidean`, minus the
    mean squared difference per feature.

    Args:
        student_NBLHMD: the student's own keys or values at each teacher's slots, centred, with unit variance.
        teacher_NBLHMD: each teacher's aligned keys or values, centred and scaled in the same way.
        mask: [N,B,M] or [N,B,L,H,M], True where both have a token; other slots are never read and may hold NaN.
        metric: `cosine`, `dot` or `euclidean`.

    Returns:
        sim_BN; 0 for a teacher without slots, which the caller must mask.

    Raises:
        FieldError: an unknown metric.
    """
    if metric not in get_args(Metric):
        raise FieldError("fuse.metric", f"must be one of {', '.join(get_args(Metric))}; got '{metric}'")
    assert student_NBLHMD.shape == teacher_NBLHMD.shape, "student and teacher must be K/V of the same slots"
    mask_NBLHM = mask[:, :, None, None] if mask.dim() == 3 else mask
    pairs = zip(student_NBLHMD, teacher_NBLHMD, mask_NBLHM, strict=True)
    return torch.stack([_similarity(*pair, metric).mean(dim=1) for pair in pairs], dim=1)


def _similarity(student_BLHMD: Tensor, teacher_BLHMD: Tensor, mask_BLHM: Tensor, metric: Metric) -> Tensor:
    """Similarity [B,L] of one teacher."""
    dtype = torch.promote_types(torch.promote_types(student_BLHMD.dtype, teacher_BLHMD.dtype), torch.float32)
    mask_BLHMD = mask_BLHM[..., None].expand_as(student_BLHMD)
    student_BLF = student_BLHMD.to(dtype).masked_fill(~mask_BLHMD, 0.0).flatten(2)
    teacher_BLF = teacher_BLHMD.to(dtype).masked_fill(~mask_BLHMD, 0.0).flatten(2)
    if metric == "cosine":
        return (_unit(student_BLF) * _unit(teacher_BLF)).sum(dim=-1)
    product_BLF = student_BLF * teacher_BLF if metric == "dot" else -(student_BLF - teacher_BLF).square()
    return product_BLF.sum(dim=-1) / mask_BLHMD.flatten(2).sum(dim=-1).clamp(min=1)


def _unit(x_BLF: Tensor) -> Tensor:
    """Normalises vectors; a zero vector stays zero, with a finite gradient."""
    square_BL1 = x_BLF.square().sum(dim=-1, keepdim=True)
    return x_BLF * square_BL1.masked_fill(square_BL1 == 0, 1.0).rsqrt()
