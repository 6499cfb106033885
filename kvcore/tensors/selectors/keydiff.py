"""`keydiff`: the tokens whose keys differ most from the mean key; reads no attention (KeyDiff, arXiv 2504.15364)."""

from __future__ import annotations

from torch.nn import functional

from kvcore.plan import Selection
from kvcore.tensors.selectors.base import Candidates, TokenSelector
from kvcore.types import Tensor


def keydiff_scores(k_BHND: Tensor) -> Tensor:
    """-cos(k_i, anchor) in fp32, [B,H,N]; the anchor is the mean of the N candidates' keys, each normalised.

    A zero key scores 0, and all keys score 0 if the anchor is zero. In scope `head` the order of tokens is that of R-KV
    with lambda 0: both use a unit key's dot product with the sum of all unit keys. Heads or layers that choose together
    average different scores, so their selections may differ.
    """
    unit_BHND = functional.normalize(k_BHND.float(), dim=-1)
    anchor_BH1D = functional.normalize(unit_BHND.sum(dim=-2, keepdim=True), dim=-1)
    return -(unit_BHND * anchor_BH1D).sum(dim=-1)


def _best(candidates: Candidates, _selection: Selection, slots: int) -> Tensor:
    return candidates.best_places(keydiff_scores(candidates.keys()), slots)


KEYDIFF = TokenSelector(_best, reads_keys=True)
