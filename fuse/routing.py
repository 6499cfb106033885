"""Teacher weights from logits, their temperature and entropy, and a warning if they collapse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from kvcore.errors import FieldError
from kvcore.types import Tensor

Choose = Literal["soft", "top1"]

# Mean weight of one teacher above which routing has collapsed.
COLLAPSE = 0.95


def to_weights(logits_BN: Tensor, present_BN: Tensor, temperature: float, choose: Choose = "soft") -> Tensor:
    """Returns the weights of the teachers: a softmax over those present, in at least fp32.

    `top1` gives 1 to the best present teacher (of equal ones the first) and 0 to the others; its gradient is that of
    the soft weights (straight-through, arXiv 1308.3432).

    Args:
        logits_BN: that of an absent teacher may be anything, also NaN.
        present_BN: which teachers have K/V of a sample.
        temperature: above 0; a lower one is closer to choosing one teacher.
        choose: `soft` or `top1`.

    Returns:
        weights_BN: 0 for absent teachers, sum 1 over the others; all 0 if none is present.

    Raises:
        FieldError: a temperature of 0 or below, or an unknown choice.
    """
    if choose not in get_args(Choose):
        raise FieldError("fuse.choose", f"must be one of {', '.join(get_args(Choose))}; got '{choose}'")
    if not temperature > 0:
        raise FieldError("fuse.temperature", f"must be above 0; got {temperature}")
    absent_BN = ~present_BN
    scaled_BN = logits_BN.to(torch.promote_types(logits_BN.dtype, torch.float32)) / temperature
    # The lowest number instead of -inf, whose softmax is NaN if no teacher is present.
    scaled_BN = scaled_BN.masked_fill(absent_BN, torch.finfo(scaled_BN.dtype).min)
    soft_BN = scaled_BN.softmax(dim=1).masked_fill(absent_BN, 0.0)
    if choose == "soft":
        return soft_BN
    best_BN = torch.zeros_like(soft_BN).scatter(1, scaled_BN.argmax(dim=1, keepdim=True), 1.0)
    # In this order the difference is exactly 0, so the result is exactly 0 or 1.
    return best_BN.masked_fill(absent_BN, 0.0) + (soft_BN - soft_BN.detach())


def temperature(epoch: float, start: float, decay: float, floor: float) -> float:
    """max(`floor`, `start` - `decay` x `epoch`)."""
    return max(floor, start - decay * epoch)


def entropy(weights_BN: Tensor, present_BN: Tensor) -> Tensor:
    """Mean entropy of soft weights, in nats: log N for N equal weights, 0 if one teacher has all.

    The mean is over samples with a present teacher; 0 if there are none. The gradient is finite at a weight of 0. Pass
    soft weights: the entropy of straight-through weights (`top1`) is always 0.

    Args:
        weights_BN: from `to_weights`.
        present_BN: which teachers have K/V of a sample.
    """
    weights_BN = weights_BN.masked_fill(~present_BN, 0.0)
    entropy_B = -(weights_BN * weights_BN.clamp(min=torch.finfo(weights_BN.dtype).tiny).log()).sum(dim=1)
    any_B = present_BN.any(dim=-1)
    return entropy_B.masked_fill(~any_B, 0.0).sum() / any_B.sum().clamp(min=1)


class CollapseDetector:
    """Warns once when the weights collapse onto one teacher, and again only after they recovered.

    Args:
        names: the teachers' names, in the order of the weights. With one teacher there is no collapse.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._collapsed: str | None = None

    def check(self, mean_weights: Sequence[float] | Tensor) -> str | None:
        """Returns a warning with the teacher, its mean weight and remedies; None if there is nothing new.

        Args:
            mean_weights: [N], over the samples since the last check.
        """
        weights = [float(weight) for weight in mean_weights]
        assert len(weights) == len(self._names), "one weight per teacher"
        weight, name = max(zip(weights, self._names, strict=True))
        collapsed = name if len(weights) > 1 and weight > COLLAPSE else None
        known, self._collapsed = self._collapsed, collapsed
        if collapsed is None or collapsed == known:
            return None
        return (
            f"routing has collapsed onto teacher '{name}': its mean weight is {weight:.3f}, above {COLLAPSE:g}. "
            "Raise fuse.entropy_weight towards 0.05, raise fuse.temperature or fuse.temperature_floor, lower optim.lr, "
            "and check that the other teachers answer and that their alignment explains enough variance"
        )
