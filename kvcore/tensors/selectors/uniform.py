"""`uniform`: evenly spaced tokens, from the first to the last."""

from __future__ import annotations

from kvcore.plan import Selection
from kvcore.tensors.selectors.base import Candidates, TokenSelector
from kvcore.types import Tensor


def _evenly(candidates: Candidates, _selection: Selection, slots: int) -> Tensor:
    last = candidates.count - 1
    if slots == 1:
        # A single slot takes the last token, whose state has read all others.
        return candidates.same_places([last])
    gaps = slots - 1
    return candidates.same_places([(2 * slot * last + gaps) // (2 * gaps) for slot in range(slots)])


UNIFORM = TokenSelector(_evenly)
