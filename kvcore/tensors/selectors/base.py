"""The interface of token selectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from kvcore.errors import NonFiniteError
from kvcore.plan import Selection
from kvcore.types import Tensor


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens of one layer to choose from, N in each sample of the call.

    `index_BN`: their ascending indices among the T tokens. `choosers` (G): how many selections a sample has, H or 1.
    In scope `sample`, H counts the heads of all layers. `importance_BHT`: mean attention from the answer to each token,
    for selectors that read it. `seeds_B` (int64) and `layer`: for selectors that draw.
    """

    index_BN: Tensor
    k_BHTD: Tensor
    choosers: int
    importance_BHT: Tensor | None = None
    seeds_B: Tensor | None = None
    layer: int = 0

    @property
    def count(self) -> int:
        """N."""
        return self.index_BN.shape[1]

    def keys(self) -> Tensor:
        """The candidates' keys, [B,H,N,D]."""
        index_BHN = self._in_each_head()
        return self.k_BHTD.gather(2, index_BHN[..., None].expand(-1, -1, -1, self.k_BHTD.shape[3]))

    def importance(self) -> Tensor | None:
        """The candidates' importance, [B,H,N]."""
        return None if self.importance_BHT is None else self.importance_BHT.gather(2, self._in_each_head())

    def same_places(self, places: Sequence[int]) -> Tensor:
        """The same candidates for every sample and chooser: [B,G,M]."""
        places_M = torch.tensor(places, dtype=torch.long, device=self.index_BN.device)
        return places_M.expand(self.index_BN.shape[0], self.choosers, -1)

    def best_places(self, score_BHN: Tensor, slots: int) -> Tensor:
        """Indices [B,G,M] into the candidates of the `slots` highest scores, ascending; of ties the earlier one.

        If heads choose together, their scores are averaged.

        Raises:
            NonFiniteError: a score is NaN or infinite.
        """
        score_BGN = score_BHN.mean(dim=1, keepdim=True) if self.choosers == 1 else score_BHN
        return best_places(score_BGN, slots)

    def _in_each_head(self) -> Tensor:
        return self.index_BN[:, None].expand(-1, self.k_BHTD.shape[1], -1)


def best_places(score_BGN: Tensor, slots: int) -> Tensor:
    """Like `Candidates.best_places`, with one row of scores per chooser."""
    finite: list[bool] = cast("Any", score_BGN.isfinite().flatten(1).all(dim=1)).tolist()
    if not all(finite):
        raise NonFiniteError("a selection score", finite)
    # A stable sort, because the order of ties in topk depends on the device.
    return score_BGN.sort(dim=-1, descending=True, stable=True).indices[..., :slots].sort(dim=-1).values


Choose = Callable[[Candidates, Selection, int], Tensor]


@dataclass(frozen=True, slots=True)
class TokenSelector:
    """A rule that selects tokens.

    `choose(candidates, selection, slots)` returns ascending indices into the candidates, int64 [B,G,M] with M =
    `slots`. `reads_keys`, `reads_importance`, `draws`: which fields of the candidates it depends on.
    """

    choose: Choose
    reads_keys: bool = False
    reads_importance: bool = False
    draws: bool = False
