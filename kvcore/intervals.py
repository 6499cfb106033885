"""Confidence intervals of shares."""

from __future__ import annotations

import math

# The 97.5 % quantile of the normal distribution.
_Z = 1.959963984540054


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share that was found in `count` trials.

    It is honest at 0 and at 1, where the bootstrap's interval has no width. Wilson, "Probable inference, the law of
    succession, and statistical inference" (1927).
    """
    centre = share + _Z**2 / (2 * count)
    spread = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    whole = 1 + _Z**2 / count
    # The share itself is inside, also where rounding says otherwise.
    return max(0.0, min(share, (centre - spread) / whole)), min(1.0, max(share, (centre + spread) / whole))
