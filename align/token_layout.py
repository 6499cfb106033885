"""Rearranges K/V to the other model's tokens: a teacher's to student tokens, the student's to teacher slots."""

from __future__ import annotations

from dataclasses import replace

import torch

from align.tokenizer_align import overlap_weights_batch, pair_ends_batch
from kvcore.types import BatchKV, Tensor


def at_student_tokens(kv: BatchKV, ends_BT: Tensor, method: str = "boundary", skip_first: int = 0) -> BatchKV:
    """Rearranges a teacher's K/V to the student's tokens: [B,L,H,T,D], zeros where masked.

    `boundary` takes the slot whose token ends at the same byte; `overlap` the mean of the slots that share bytes with
    the student's token, weighted by how many. Tokens without such a slot are masked.

    Args:
        kv: of a plan with scope `sample`; for `overlap` of whole texts.
        ends_BT: byte ends of the student's tokens in the same texts, -1 in padding.
        method: `boundary` or `overlap`.
        skip_first: how many first text tokens of each sample to mask.
    """
    ends_BT = ends_BT.to(kv.mask_BM.device)
    kept_BT = beyond_first(ends_BT, skip_first)
    if method == "overlap":
        weights_BTM, mask_BT = overlap_weights_batch(_slot_ends(kv), ends_BT)
        mask_BT = mask_BT & kept_BT
        weights_BTM = weights_BTM * mask_BT[:, :, None]
        laid_out = kv.map(lambda x_BLHMD: _weighted(x_BLHMD, weights_BTM, kv.mask_BM))
    else:
        index_BT = slots_of_tokens(kv, ends_BT.masked_fill(~kept_BT, -1))
        mask_BT = index_BT >= 0
        laid_out = kv.map(lambda x_BLHMD: gather_slots(x_BLHMD, index_BT))
    return replace(laid_out, mask_BM=mask_BT, byte_ends_BLHM=ends_BT[:, None, None])


def at_teacher_slots(
    x_BLHTD: Tensor, student_ends_BT: Tensor, kv: BatchKV, skip_first: int = 0
) -> tuple[Tensor, Tensor]:
    """Rearranges the student's own K/V to a teacher's slots: each slot takes the token that ends at the same byte.

    Args:
        x_BLHTD: the student's keys or values.
        student_ends_BT: byte ends of its tokens, -1 in padding.
        kv: the teacher's K/V. With scope `layer` or `head` it must have as many layers or heads as the student.
        skip_first: how many first text tokens of each sample to leave out.

    Returns:
        x_BLHMD, zeros where masked, and mask_BLHM: False for empty slots and slots without a student token.
    """
    ends_BLHM = kv.byte_ends_BLHM.masked_fill(~kv.mask_BM[:, None, None], -1).to(x_BLHTD.device)
    student_BT = student_ends_BT.to(x_BLHTD.device)
    student_BT = student_BT.masked_fill(~beyond_first(student_BT, skip_first), -1)
    index_BLHM = pair_ends_batch(student_BT, ends_BLHM.flatten(1)).view_as(ends_BLHM)
    index_BLHM = index_BLHM.expand(*x_BLHTD.shape[:3], -1)
    chosen = index_BLHM.clamp(min=0)[..., None].expand(*index_BLHM.shape, x_BLHTD.shape[-1])
    mask_BLHM = index_BLHM >= 0
    return x_BLHTD.gather(3, chosen).masked_fill(~mask_BLHM[..., None], 0.0), mask_BLHM


def beyond_first(ends_BT: Tensor, count: int) -> Tensor:
    """[B,T]: True for tokens of text (an end that is not -1), except each sample's first `count`."""
    text_BT = ends_BT >= 0
    return text_BT & (text_BT.cumsum(dim=1) > count)


def sink_ends(ends_BT: Tensor, count: int) -> Tensor:
    """[B]: the byte at which each sample's first `count` text tokens end; -1 if there are none."""
    sinks_BT = (ends_BT >= 0) & ~beyond_first(ends_BT, count)
    return torch.where(sinks_BT, ends_BT, -1).amax(dim=1)


def slots_beyond_sinks(kv: BatchKV, student_ends_BT: Tensor, count: int) -> Tensor:
    """[B,M]: the slots whose token lies beyond the first `count` tokens of the student in every layer and head.

    Args:
        kv: a teacher's K/V.
        student_ends_BT: byte ends of the student's tokens in the same texts, -1 in padding.
        count: how many first text tokens of each sample to leave out.
    """
    if count == 0:
        return kv.mask_BM
    # Bytes read up to each slot, also for slots whose own end is unknown.
    read_BLHM = kv.byte_ends_BLHM.cummax(dim=3).values
    sink_B111 = sink_ends(student_ends_BT.to(kv.mask_BM.device), count)[:, None, None, None]
    beyond_BLHM = (read_BLHM > sink_B111) | ((read_BLHM == sink_B111) & (kv.byte_ends_BLHM < 0))
    return kv.mask_BM & beyond_BLHM.all(dim=2).all(dim=1)


def slots_of_tokens(kv: BatchKV, student_ends_BT: Tensor) -> Tensor:
    """For each student token, the teacher slot whose token ends at the same byte, or -1 (`boundary` pairing).

    Args:
        kv: of a plan with scope `sample`, or with one layer and head, so that a slot holds one token everywhere.
        student_ends_BT: byte ends of the student's tokens in the same texts, -1 in padding.

    Returns:
        int64 [B,T], an index into M.
    """
    ends_BM = _slot_ends(kv)
    return pair_ends_batch(ends_BM, student_ends_BT.to(ends_BM.device))


def gather_slots(x_BLHMD: Tensor, index_BT: Tensor) -> Tensor:
    """The slot of each student token: x_BLHTD, zeros where the index is -1; its mask is `index_BT >= 0`."""
    batch, layers, heads, _, dim = x_BLHMD.shape
    index = index_BT.clamp(min=0)[:, None, None, :, None].expand(batch, layers, heads, index_BT.shape[1], dim)
    return x_BLHMD.gather(3, index).masked_fill(index_BT[:, None, None, :, None] < 0, 0.0)


def _slot_ends(kv: BatchKV) -> Tensor:
    """[B,M]: byte ends, -1 in empty slots."""
    assert kv.byte_ends_BLHM.shape[1:3] == (1, 1), "slots hold different tokens in different layers or heads"
    return kv.byte_ends_BLHM[:, 0, 0].masked_fill(~kv.mask_BM, -1)


def _weighted(x_BLHMD: Tensor, weights_BTM: Tensor, mask_BM: Tensor) -> Tensor:
    # An empty slot may hold NaN, and NaN times a weight of 0 is NaN.
    kept_BLHMD = x_BLHMD.float().masked_fill(~mask_BM[:, None, None, :, None], 0.0)
    return torch.einsum("btm,blhmd->blhtd", weights_BTM, kept_BLHMD)
