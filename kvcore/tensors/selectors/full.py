"""`full`: all tokens."""

from __future__ import annotations

from kvcore.plan import Selection
from kvcore.tensors.selectors.base import Candidates, TokenSelector
from kvcore.types import Tensor


def _all(candidates: Candidates, _selection: Selection, _slots: int) -> Tensor:
    return candidates.same_places(range(candidates.count))


FULL = TokenSelector(_all)
