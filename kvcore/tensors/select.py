"""Which tokens leave the teacher, batched over samples, heads and layers. `kvcore/selectors` has the ways to choose.

Equal scores go to the earlier token, so a selection is repeatable. Chosen tokens are in time order.
"""

from __future__ import annotations

from kvcore.plan import SELECTORS, Selection
from kvcore.tensors.selectors.base import Candidates, TokenSelector
from kvcore.types import Tensor


def select(
    selection: Selection,
    candidates_BN: Tensor,
    k_BHTD: Tensor,
    importance_BHT: Tensor | None,
    *,
    layer: int = 0,
    seeds_B: Tensor | None = None,
) -> Tensor:
    """Chooses tokens of one layer.

    Args:
        selection: what to choose by, and how many.
        candidates_BN: the token indices that may be chosen, ascending, as many for each sample of the call.
        k_BHTD: the layer's content keys.
        importance_BHT: mean attention that the answer pays to each token; read only if `needs_importance`.
        layer: the teacher's layer; read only if `needs_seeds`.
        seeds_B: each sample's seed, int64 (`kvcore.tensors.selectors.random.sample_seed`); read only if `needs_seeds`.

    Returns:
        Positions, int32 [B,H,M] in scope `head`, [B,1,M] otherwise, ascending; M is min(budget, N), or N for `full`.

    Raises:
        NonFiniteError: a score that decides is NaN or infinite.
    """
    assert selection.scope != "sample" or not needs_keys(selection), "scope 'sample' weighs all layers together"
    choosers = k_BHTD.shape[1] if selection.scope == "head" else 1
    index_BN = candidates_BN.to(k_BHTD.device)
    seeds_B = None if seeds_B is None else seeds_B.to(k_BHTD.device)
    return _choose(selection, Candidates(index_BN, k_BHTD, choosers, importance_BHT, seeds_B, layer))


def select_sample(
    selection: Selection, candidates_BN: Tensor, k_BLHTD: Tensor, importance_BLHT: Tensor | None
) -> Tensor:
    """Chooses the same tokens for all layers and heads, by the mean of their scores; see `select`.

    Returns:
        Positions, int32 [B,1,M], ascending.

    Raises:
        NonFiniteError: a score that decides is NaN or infinite.
    """
    assert needs_keys(selection), "what does not read keys is chosen without waiting for all layers"
    importance_BHT = None if importance_BLHT is None else importance_BLHT.flatten(1, 2)
    index_BN = candidates_BN.to(k_BLHTD.device)
    return _choose(selection, Candidates(index_BN, k_BLHTD.flatten(1, 2), 1, importance_BHT))


def needs_keys(selection: Selection) -> bool:
    """Whether the choice depends on keys, so that scope `sample` has to wait for all layers."""
    return _selector(selection).reads_keys


def needs_importance(selection: Selection) -> bool:
    """Whether the choice depends on the attention that the answer pays."""
    return _selector(selection).reads_importance and selection.importance_weight > 0.0


def needs_seeds(selection: Selection) -> bool:
    """Whether the choice is drawn, by the sample's seed and the layer."""
    return _selector(selection).draws


def _selector(selection: Selection) -> TokenSelector:
    return SELECTORS.load(selection.selector, TokenSelector)


def _choose(selection: Selection, candidates: Candidates) -> Tensor:
    slots = candidates.count if selection.selector == "full" else min(selection.budget, candidates.count)
    places_BGM = _selector(selection).choose(candidates, selection, slots)
    index_BGN = candidates.index_BN[:, None].expand(-1, candidates.choosers, -1)
    return index_BGN.gather(2, places_BGM).int()
