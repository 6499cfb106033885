"""Resamples a teacher's selected slots to the student's number of slots, within each segment of a text.

Every slot has a segment id: 0 prompt, 1 reasoning, 2 answer; negative if the slot is empty. Within a segment, slots are
in order.
"""

from __future__ import annotations

import torch

from kvcore.types import Tensor


class TimeAligner:
    """Resamples along the slots of each segment; the identity if both sides have the same number of slots.

    The segment's source slots and its target slots are placed evenly on [0, 1], including both ends, and a target slot
    interpolates linearly between its two neighbours. A single target slot takes the last source slot, whose causal
    state has read the whole segment; a single source slot goes to every target slot.
    """

    def weights(self, source_BM: Tensor, target_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the source slots for each target slot.

        Args:
            source_BM: integer segment of each source slot; negative if it is empty.
            target_BS: integer segment of each target slot; negative if it is empty.

        Returns:
            fp32 [B,S,M], and a mask [B,S] that is True where a row sums to 1. Rows are zero for empty target slots and
            for segments without source slots.
        """
        source_B1M, target_BS1 = source_BM[:, None, :], target_BS[:, :, None]
        same_BSM = (target_BS1 == source_B1M) & (target_BS1 >= 0)
        rank_BM, _ = _rank_and_count(source_BM)
        rank_BS, targets_BS = _rank_and_count(target_BS)
        sources_BS1 = same_BSM.sum(dim=2, keepdim=True)
        shares_BSM = _shares(rank_BS[:, :, None], targets_BS[:, :, None], rank_BM[:, None, :], sources_BS1)
        # Integers up to here, so that a full share is exactly 1.
        shares_BSM = shares_BSM * same_BSM
        weights_BSM = shares_BSM.float() / shares_BSM.sum(dim=2, keepdim=True).clamp(min=1).float()
        return weights_BSM, sources_BS1[:, :, 0] > 0

    def resample(self, x_BLHMD: Tensor, source_BM: Tensor, target_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Resamples keys or values to the target slots, in fp32, differentiable; other arguments as in `weights`.

        Args:
            x_BLHMD: content keys or values; empty slots may hold anything, also NaN.

        Returns:
            [B,L,H,S,D], zero in masked slots, and the mask [B,S].
        """
        weights_BSM, mask_BS = self.weights(source_BM, target_BS)
        unused_BM = (weights_BSM == 0).all(dim=1)
        clean_BLHMD = x_BLHMD.float().masked_fill(unused_BM[:, None, None, :, None], 0.0)
        return torch.einsum("bsm,blhmd->blhsd", weights_BSM, clean_BLHMD), mask_BS


def _shares(rank_S: Tensor, targets: Tensor, rank_M: Tensor, sources: Tensor) -> Tensor:
    """Integers proportional to the weight of each source slot.

    Args:
        rank_S: the rank of a target slot among the target slots of its segment.
        targets: the number of these.
        rank_M: the rank of a source slot among the source slots of its segment.
        sources: the number of these.
    """
    step = (targets - 1).clamp(min=1)
    # Position of a target slot among the source slots, times `step`; a single target takes the last source.
    place = torch.where(targets == 1, sources - 1, rank_S * (sources - 1))
    return (step - (place - rank_M * step).abs()).clamp(min=0)


def _rank_and_count(segments_BM: Tensor) -> tuple[Tensor, Tensor]:
    """For each slot, how many slots of its segment precede it, and how many the segment has."""
    same_BMM = segments_BM[:, :, None] == segments_BM[:, None, :]
    return same_BMM.tril(-1).sum(dim=2), same_BMM.sum(dim=2)
