"""Selects the tokens that a teacher sends, batched over samples, heads and layers.

The selectors are in `kvcore/tensors/selectors`. Of equal scores the earlier token wins, so a selection is repeatable.
Selected tokens are in time order.
"""

from __future__ import annotations

import torch

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
    """Selects tokens of one layer.

    Args:
        selection: selector, budget and scope.
        candidates_BN: ascending indices of the tokens to choose from; N is the same for all samples of a call.
        k_BHTD: the layer's content keys.
        importance_BHT: mean attention that the answer pays to each token; read only if `needs_importance`.
        layer: the teacher's layer; read only if `needs_seeds`.
        seeds_B: each sample's seed, int64 (`kvcore.tensors.selectors.random.sample_seed`); read only if `needs_seeds`.

    Returns:
        Positions, int32 [B,H,M] in scope `head`, [B,1,M] otherwise, ascending; M is min(budget, N), or N for `full`.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    assert selection.scope != "sample" or not needs_keys(selection), "use select_sample, which reads all layers"
    choosers = k_BHTD.shape[1] if selection.scope == "head" else 1
    index_BN = candidates_BN.to(k_BHTD.device)
    seeds_B = None if seeds_B is None else seeds_B.to(k_BHTD.device)
    return _choose(selection, Candidates(index_BN, k_BHTD, choosers, importance_BHT, seeds_B, layer))


def select_sample(
    selection: Selection, candidates_BN: Tensor, k_BLHTD: Tensor, importance_BLHT: Tensor | None
) -> Tensor:
    """Selects the same tokens for all layers and heads, by the mean of their scores; see `select`.

    Returns:
        Positions, int32 [B,1,M], ascending.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    assert needs_keys(selection), "a selector that reads no keys need not wait for all layers: use select"
    importance_BHT = None if importance_BLHT is None else importance_BLHT.flatten(1, 2)
    index_BN = candidates_BN.to(k_BLHTD.device)
    return _choose(selection, Candidates(index_BN, k_BLHTD.flatten(1, 2), 1, importance_BHT))


def select_layers(
    selection: Selection,
    candidates_BN: Tensor,
    k_BLHTD: Tensor,
    importance_BLHT: Tensor | None,
    seeds_B: Tensor | None = None,
) -> Tensor:
    """Selects tokens of all layers at once; see `select`.

    Returns:
        Positions, int32 [B,L,H,M] in scope `head`, [B,L,1,M] in scope `layer`, [B,1,1,M] in scope `sample`, ascending.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    layers, heads = k_BLHTD.shape[1:3]
    if selection.scope == "sample" and needs_keys(selection):
        return select_sample(selection, candidates_BN, k_BLHTD, importance_BLHT)[:, None]
    if selection.scope == "sample":
        return select(selection, candidates_BN, k_BLHTD[:, 0], None, seeds_B=seeds_B)[:, None]
    if selection.scope == "head":
        # A head does not depend on the others, so the heads of all layers are those of one layer.
        importance_BHT = None if importance_BLHT is None else importance_BLHT.flatten(1, 2)
        found_BHM = select(selection, candidates_BN, k_BLHTD.flatten(1, 2), importance_BHT, seeds_B=seeds_B)
        return found_BHM.reshape(len(found_BHM), layers, heads, -1)
    found: list[Tensor] = []
    for layer in range(layers):
        importance_BHT = None if importance_BLHT is None else importance_BLHT[:, layer]
        found.append(select(selection, candidates_BN, k_BLHTD[:, layer], importance_BHT, layer=layer, seeds_B=seeds_B))
    return torch.stack(found, dim=1)


def needs_keys(selection: Selection) -> bool:
    """Whether the selector reads keys; if so, scope `sample` has to wait for all layers."""
    return _selector(selection).reads_keys


def needs_importance(selection: Selection) -> bool:
    """Whether the selector reads the attention from the answer."""
    return _selector(selection).reads_importance and selection.importance_weight > 0.0


def needs_seeds(selection: Selection) -> bool:
    """Whether the selector draws tokens at random, from the sample's seed and the layer."""
    return _selector(selection).draws


def _selector(selection: Selection) -> TokenSelector:
    return SELECTORS.load(selection.selector, TokenSelector)


def _choose(selection: Selection, candidates: Candidates) -> Tensor:
    slots = candidates.count if selection.selector == "full" else min(selection.budget, candidates.count)
    places_BGM = _selector(selection).choose(candidates, selection, slots)
    index_BGN = candidates.index_BN[:, None].expand(-1, candidates.choosers, -1)
    return index_BGN.gather(2, places_BGM).int()
