"""`right`: the last tokens, whose states have read the most text. KaVa's baseline `crop`."""

from __future__ import annotations

from kvcore.plan import Selection
from kvcore.tensors.selectors.base import Candidates, TokenSelector
from kvcore.types import Tensor


def _last(candidates: Candidates, _selection: Selection, slots: int) -> Tensor:
    return candidates.same_places(range(candidates.count - slots, candidates.count))


RIGHT = TokenSelector(_last)
