"""Resamples the slots that a teacher selected to as many as the student has, never across segments of a text.

A segment id per slot says what the slot was taken from or stands for: 0 prompt, 1 reasoning, 2 answer; negative for an
empty slot. Within a segment, slots count in their order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvcore.errors import FieldError
from kvcore.types import Tensor

# From a target slot's rank among its segment's S_g target slots and a source slot's rank among its M_g source slots to
# integers that are proportional to weights over the source slots.
Shares = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _linear(rank_S: Tensor, targets: Tensor, rank_M: Tensor, sources: Tensor) -> Tensor:
    step = (targets - 1).clamp(min=1)
    return (step - (_place(rank_S, targets, sources) - rank_M * step).abs()).clamp(min=0)


def _nearest(rank_S: Tensor, targets: Tensor, rank_M: Tensor, sources: Tensor) -> Tensor:
    step = (targets - 1).clamp(min=1)
    # Rounds to the nearest, halves down.
    nearest = -((step - 2 * _place(rank_S, targets, sources)) // (2 * step))
    return (rank_M == nearest).long()


def _segment(rank_S: Tensor, targets: Tensor, rank_M: Tensor, sources: Tensor) -> Tensor:
    end = torch.minimum((rank_S + 1) * sources, (rank_M + 1) * targets)
    return (end - torch.maximum(rank_S * sources, rank_M * targets)).clamp(min=0)


def _place(rank_S: Tensor, targets: Tensor, sources: Tensor) -> Tensor:
    """Where a target slot lies among the source slots, times targets - 1; the last source slot for a lone target."""
    return torch.where(targets == 1, sources - 1, rank_S * (sources - 1))


_SHARES: dict[str, Shares] = {"linear": _linear, "nearest": _nearest, "segment": _segment}
METHODS = tuple(_SHARES)


class TimeAligner:
    """Resamples along the slots of each segment; with as many slots on both sides exactly the identity.

    `linear` and `nearest` spread the segment's source slots and its target slots evenly over [0, 1], end to end, and
    interpolate between the two neighbours or take the nearer one (the earlier of two equally near). A lone target slot
    takes the last source slot, whose causal state has read all; a lone source slot feeds every target slot. `segment`
    averages: target slot j of S is the mean over its share [jM/S, (j+1)M/S) of the M source slots.

    Args:
        method: `linear`, `nearest` or `segment`.

    Raises:
        FieldError: unknown method.
    """

    def __init__(self, method: str) -> None:
        if method not in _SHARES:
            raise FieldError("method", f"expected one of {', '.join(METHODS)}; got '{method}'")
        self._shares = _SHARES[method]

    def weights(self, source_BM: Tensor, target_BS: Tensor) -> tuple[Tensor, Tensor]:
        """How much of each source slot a target slot takes.

        Args:
            source_BM: the segment of each slot that there is, as integers; negative where it is empty.
            target_BS: the segment of each slot that is wanted; negative where none is.

        Returns:
            fp32 [B,S,M], and a mask [B,S] that is True where a row sums to 1. Rows of empty target slots, and of those
            whose segment has no source slot, are zero.
        """
        source_B1M, target_BS1 = source_BM[:, None, :], target_BS[:, :, None]
        same_BSM = (target_BS1 == source_B1M) & (target_BS1 >= 0)
        rank_BM, _ = _rank_and_count(source_BM)
        rank_BS, targets_BS = _rank_and_count(target_BS)
        sources_BS1 = same_BSM.sum(dim=2, keepdim=True)
        shares_BSM = self._shares(rank_BS[:, :, None], targets_BS[:, :, None], rank_BM[:, None, :], sources_BS1)
        # Integers up to here, so that a share of everything is exactly 1.
        shares_BSM = shares_BSM * same_BSM
        weights_BSM = shares_BSM.float() / shares_BSM.sum(dim=2, keepdim=True).clamp(min=1).float()
        return weights_BSM, sources_BS1[:, :, 0] > 0

    def resample(self, x_BLHMD: Tensor, source_BM: Tensor, target_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Keys or values at the target slots, in fp32, differentiable; arguments otherwise as of `weights`.

        Args:
            x_BLHMD: content keys or values; what stands in empty slots, NaN too, goes nowhere.

        Returns:
            [B,L,H,S,D], zero in masked slots, and the mask [B,S].
        """
        weights_BSM, mask_BS = self.weights(source_BM, target_BS)
        unused_BM = (weights_BSM == 0).all(dim=1)
        clean_BLHMD = x_BLHMD.float().masked_fill(unused_BM[:, None, None, :, None], 0.0)
        return torch.einsum("bsm,blhmd->blhsd", weights_BSM, clean_BLHMD), mask_BS


def _rank_and_count(segments_BM: Tensor) -> tuple[Tensor, Tensor]:
    """For each slot how many of its segment come before it, and how many there are."""
    same_BMM = segments_BM[:, :, None] == segments_BM[:, None, :]
    return same_BMM.tril(-1).sum(dim=2), same_BMM.sum(dim=2)
