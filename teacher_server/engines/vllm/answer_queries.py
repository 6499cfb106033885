"""Collects the queries of answers' tokens while prompts are computed, for selectors that rank by their attention.

A prompt may take several passes. Its answer's queries are kept from the passes that compute them, and used in the last
pass. vLLM concatenates the tokens of a pass; a token is found among them by its slot in the cache, which is unique.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvcore.models.attention_taps import AnswerRows, LayerTap, answer_importance
from kvcore.types import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """A request's tokens `start` to `end` in a pass, its answer's tokens, its blocks, and the layers of its plan."""

    answer_A: NDArray[np.int64]
    start: int
    end: int
    blocks: list[int]
    layers: frozenset[str]


class AnswerQueries:
    """The answers' queries of the running requests.

    Args:
        block_size: tokens per block of the cache.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        # By request and layer: queries [a,Q,D] of answer tokens, in order.
        self._kept: dict[str, dict[str, list[Tensor]]] = {}
        self._slots: dict[str, tuple[Tensor, frozenset[str]]] = {}
        self._query: dict[str, Tensor] = {}
        # Indices of each request's answer tokens among the tokens of the pass: the same in every layer.
        self._places: dict[str, Tensor] = {}

    @property
    def needed(self) -> bool:
        """Whether this pass computes tokens of an answer."""
        return bool(self._slots)

    def begin(self, ended: Sequence[str]) -> None:
        """Begin a pass; drop the queries of requests that ended."""
        self._slots.clear()
        self._places.clear()
        self._query.clear()
        for name in ended:
            self._kept.pop(name, None)

    def add(self, name: str, segment: Segment) -> None:
        """Add a request to the pass. A segment from token 0 starts over, as after a preemption."""
        if segment.start == 0 or name not in self._kept:
            self._kept[name] = {}
        inside = segment.answer_A[(segment.answer_A >= segment.start) & (segment.answer_A < segment.end)]
        if inside.size:
            blocks = np.asarray(segment.blocks)[inside // self._block_size]
            slots_a = torch.from_numpy(blocks * self._block_size + inside % self._block_size)
            self._slots[name] = slots_a, segment.layers

    def observe(self, layer: str, q_TQD: Tensor) -> None:
        """Take the pass's queries of one layer, before its attention."""
        self._query[layer] = q_TQD

    def keep(self, layer: str, slots_T: Tensor) -> None:
        """Copy the answers' queries of one layer; `slots_T` is the cache slot of each token of the pass."""
        q_TQD = self._query.pop(layer, None)
        if q_TQD is None:
            return
        for name, (_, layers) in self._slots.items():
            if layer in layers:
                place_a = self._place(name, slots_T)
                self._kept[name].setdefault(layer, []).append(q_TQD[place_a])

    def _place(self, name: str, slots_T: Tensor) -> Tensor:
        """Indices of a request's answer in the pass, computed for all requests in the first layer that needs them."""
        if not self._places:
            order_T = slots_T.argsort()
            sorted_T = slots_T[order_T]
            for other, (wanted_a, _) in self._slots.items():
                self._places[other] = order_T[torch.searchsorted(sorted_T, wanted_a.to(slots_T))]
        return self._places[name]

    def take(self, layer: str, names: Sequence[str], answers: Sequence[NDArray[np.int64]]) -> BatchQueries | None:
        """The queries of requests whose prompts end; None if no plan needs them.

        Raises:
            RuntimeError: queries are missing, because their tokens were not computed.
        """
        rows = [row for row, answer_A in enumerate(answers) if answer_A.size]
        if not rows:
            return None
        longest = max(answers[row].size for row in rows)
        padded: list[Tensor] = []
        for row in rows:
            kept = self._kept[names[row]].pop(layer, [])
            if sum(len(q) for q in kept) != answers[row].size:
                raise RuntimeError("the queries of the answer are not complete")
            q_AQD = torch.cat(kept)
            padded.append(torch.cat([q_AQD, q_AQD.new_zeros(longest - len(q_AQD), *q_AQD.shape[1:])]))
        return BatchQueries(torch.stack(padded).transpose(1, 2), rows, [answers[row].tolist() for row in rows])


@dataclass(frozen=True, slots=True)
class BatchQueries:
    """Rotated queries [b,Q,A,D] of the answers of some `rows` of a batch, and the answers' token indices."""

    q_bQAD: Tensor
    rows: list[int]
    answers: list[list[int]]

    def with_all_heads(self, gather: Callable[[Tensor], Tensor]) -> BatchQueries:
        """The same with all ranks' query heads."""
        return BatchQueries(gather(self.q_bQAD), self.rows, self.answers)

    def importance(self, layer: int, k_BHTD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Importance as in `LayerOutput`, from the rotated keys of all prompt tokens; 0 for rows without an answer."""
        device = k_BHTD.device
        index_b = torch.tensor(self.rows, device=device)
        k_bHTD = k_BHTD[index_b]
        tap = LayerTap(layer, k_bHTD, k_bHTD, self.q_bQAD, k_bHTD, k_bHTD, None, scale, {})
        rows = AnswerRows.of(self.answers, device)
        places_bA = torch.arange(self.q_bQAD.shape[2], device=device).expand(len(self.rows), -1)
        largest_bHT, mean_bHT = answer_importance(tap, AnswerRows(rows.index_BA, rows.valid_BA, places_bA))
        largest_BHT = largest_bHT.new_zeros(k_BHTD.shape[:3]).index_copy(0, index_b, largest_bHT)
        return largest_BHT, torch.zeros_like(largest_BHT).index_copy(0, index_b, mean_bHT)
