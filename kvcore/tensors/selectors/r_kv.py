"""`r_kv`: tokens that the answer attends to and that are not redundant, as in KaVa (arXiv 2510.02312).

S = lambda*I + (1-lambda)*R for each token of each head; the M tokens with the highest S are kept. KaVa simplifies R-KV
(arXiv 2505.24133): no window of recent tokens, no smoothing of the importance, no similarity threshold.

`r_kv_centred` removes each head's mean key before the redundancy. On a real model, any two keys of a head have a cosine
near .8, so that without this R is nearly the same for all tokens.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from kvcore.plan import Selection
from kvcore.tensors.selectors.base import Candidates, TokenSelector
from kvcore.types import Tensor


def r_kv_scores(k_BHND: Tensor, importance_BHN: Tensor | None, importance_weight: float) -> Tensor:
    """lambda*I + (1-lambda)*R in fp32, [B,H,N]; I is the given importance, lambda the `importance_weight`."""
    score_BHN = (1.0 - importance_weight) * redundancy(k_BHND)
    if importance_weight > 0.0:
        assert importance_BHN is not None, "r_kv with a positive importance_weight needs the importance"
        score_BHN = score_BHN + importance_weight * importance_BHN.float()
    return score_BHN


def redundancy(k_BHND: Tensor) -> Tensor:
    """R = softmax_i(-mean_j cos(k_i, k_j)) over the N candidates, in fp32, [B,H,N].

    The diagonal (a key's cosine with itself) counts as 0, so the sum of N-1 cosines is divided by N. A zero key has
    cosine 0 with every other key.
    """
    unit_BHND = functional.normalize(k_BHND.float(), dim=-1)
    # The sum over j is one dot product with the sum of the unit keys, so the N x N cosines are never computed.
    with_all_BHN = (unit_BHND * unit_BHND.sum(dim=-2, keepdim=True)).sum(dim=-1)
    with_itself_BHN = unit_BHND.square().sum(dim=-1)
    mean_cosine_BHN = (with_all_BHN - with_itself_BHN) / max(k_BHND.shape[-2], 1)
    return torch.softmax(-mean_cosine_BHN, dim=-1)


def centred(k_BHND: Tensor) -> Tensor:
    """The keys in fp32 without each head's mean over the N candidates."""
    return k_BHND.float() - k_BHND.float().mean(dim=-2, keepdim=True)


def _best(candidates: Candidates, selection: Selection, slots: int) -> Tensor:
    return _best_of(candidates, candidates.keys(), selection, slots)


def _best_centred(candidates: Candidates, selection: Selection, slots: int) -> Tensor:
    return _best_of(candidates, centred(candidates.keys()), selection, slots)


def _best_of(candidates: Candidates, k_BHND: Tensor, selection: Selection, slots: int) -> Tensor:
    return candidates.best_places(r_kv_scores(k_BHND, candidates.importance(), selection.importance_weight), slots)


R_KV = TokenSelector(_best, reads_keys=True, reads_importance=True)
R_KV_CENTRED = TokenSelector(_best_centred, reads_keys=True, reads_importance=True)
