"""Which tokens leave the teacher: one small registry, batched over samples, heads and layers.

A selector either goes by place alone (`full`, `right`, `uniform`) or scores every candidate (`r_kv`) and keeps the
best; equal scores go to the earlier token, so a selection is repeatable. Chosen tokens are in time order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional

from kvcore.errors import NonFiniteError
from kvcore.plan import Selection, Selector
from kvcore.types import Tensor


def select(selection: Selection, candidates_BN: Tensor, k_BHTD: Tensor, importance_BHT: Tensor | None) -> Tensor:
    """Chooses tokens of one layer.

    `candidates_BN`: the token indices that may be chosen, ascending, as many for each sample of the call.
    `importance_BHT`: mean attention that the answer pays to each token; read only if `needs_importance`.

    Returns:
        Positions, int32 [B,H,M] in scope `head`, [B,1,M] otherwise, ascending; M is min(budget, N), or N for `full`.

    Raises:
        NonFiniteError: a score that decides is NaN or infinite.
    """
    assert selection.scope != "sample" or not needs_keys(selection), "scope 'sample' weighs all layers together"
    groups = k_BHTD.shape[1] if selection.scope == "head" else 1
    return _choose(selection, candidates_BN.to(k_BHTD.device), k_BHTD, importance_BHT, groups)


def select_sample(
    selection: Selection, candidates_BN: Tensor, k_BLHTD: Tensor, importance_BLHT: Tensor | None
) -> Tensor:
    """Chooses the same tokens for all layers and heads, by the mean of their scores; see `select`.

    Returns:
        Positions, int32 [B,1,M], ascending.

    Raises:
        NonFiniteError: a score that decides is NaN or infinite.
    """
    importance_BHT = None if importance_BLHT is None else importance_BLHT.flatten(1, 2)
    return _choose(selection, candidates_BN.to(k_BLHTD.device), k_BLHTD.flatten(1, 2), importance_BHT, groups=1)


def needs_keys(selection: Selection) -> bool:
    """Whether the choice depends on keys, so that scope `sample` has to wait for all layers."""
    return _REGISTRY[selection.selector].scores is not None


def needs_importance(selection: Selection) -> bool:
    """Whether the choice depends on the attention that the answer pays."""
    return needs_keys(selection) and selection.importance_weight > 0.0


def r_kv_scores(k_BHND: Tensor, importance_BHN: Tensor | None, importance_weight: float) -> Tensor:
    """R-KV as KaVa uses it (arXiv 2510.02312 after 2505.24133): lambda*I + (1-lambda)*R, in fp32, [B,H,N].

    I is the importance as given; R = softmax_i(-mean_j cos(k_i, k_j)) over the N candidates, a key's cosine with itself
    counted as 0. A zero key has cosine 0 with every other.
    """
    unit_BHND = functional.normalize(k_BHND.float(), dim=-1)
    # The N x N cosines are never made: summed over j they are one dot product with the sum of the unit keys.
    with_all_BHN = (unit_BHND * unit_BHND.sum(dim=-2, keepdim=True)).sum(dim=-1)
    with_itself_BHN = unit_BHND.square().sum(dim=-1)
    mean_cosine_BHN = (with_all_BHN - with_itself_BHN) / max(k_BHND.shape[-2], 1)
    score_BHN = (1.0 - importance_weight) * torch.softmax(-mean_cosine_BHN, dim=-1)
    if importance_weight > 0.0:
        assert importance_BHN is not None, "r_kv with a positive importance_weight needs the importance"
        score_BHN = score_BHN + importance_weight * importance_BHN.float()
    return score_BHN


@dataclass(frozen=True, slots=True)
class _Strategy:
    """Exactly one of: `places(candidates, slots)` gives indices of candidates, `scores` rates every candidate."""

    places: Callable[[int, int], list[int]] | None = None
    scores: Callable[[Tensor, Tensor | None, float], Tensor] | None = None


def _last_places(candidates: int, slots: int) -> list[int]:
    return list(range(candidates - slots, candidates))


def _even_places(candidates: int, slots: int) -> list[int]:
    if slots <= 1:
        # A single slot takes the last candidate, whose state has read all the others.
        return _last_places(candidates, slots)
    gaps = slots - 1
    return [(2 * slot * (candidates - 1) + gaps) // (2 * gaps) for slot in range(slots)]


_REGISTRY: dict[Selector, _Strategy] = {
    "full": _Strategy(places=_last_places),
    "right": _Strategy(places=_last_places),
    "uniform": _Strategy(places=_even_places),
    "r_kv": _Strategy(scores=r_kv_scores),
}


def _choose(
    selection: Selection, candidates_BN: Tensor, k_BHTD: Tensor, importance_BHT: Tensor | None, groups: int
) -> Tensor:
    candidates = candidates_BN.shape[1]
    slots = candidates if selection.selector == "full" else min(selection.budget, candidates)
    strategy = _REGISTRY[selection.selector]
    if strategy.places is not None:
        places_M = torch.tensor(strategy.places(candidates, slots), dtype=torch.long, device=candidates_BN.device)
        return candidates_BN[:, None, places_M].expand(-1, groups, -1).to(torch.int32).contiguous()
    assert strategy.scores is not None
    k_BHND, importance_BHN = _at_candidates(candidates_BN, k_BHTD, importance_BHT)
    score_BGN = strategy.scores(k_BHND, importance_BHN, selection.importance_weight)
    if groups == 1:
        score_BGN = score_BGN.mean(dim=1, keepdim=True)
    places_BGM = _best_places(score_BGN, slots)
    return candidates_BN[:, None].expand(-1, groups, -1).gather(2, places_BGM).to(torch.int32)


def _at_candidates(
    candidates_BN: Tensor, k_BHTD: Tensor, importance_BHT: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    index_BHN = candidates_BN[:, None].expand(-1, k_BHTD.shape[1], -1)
    k_BHND = k_BHTD.gather(2, index_BHN[..., None].expand(-1, -1, -1, k_BHTD.shape[3]))
    return k_BHND, None if importance_BHT is None else importance_BHT.gather(2, index_BHN)


def _best_places(score_BGN: Tensor, slots: int) -> Tensor:
    """The places of the `slots` highest scores, ascending; ties go to the earlier place."""
    finite: list[bool] = cast("Any", score_BGN.isfinite().flatten(1).all(dim=1)).tolist()
    if not all(finite):
        raise NonFiniteError("a selection score", finite)
    # A stable sort, since topk leaves the order of ties to the device.
    return score_BGN.sort(dim=-1, descending=True, stable=True).indices[..., :slots].sort(dim=-1).values
