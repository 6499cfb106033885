"""Keeps the queries of answers' tokens while their prompts are computed, for selectors that rank by their attention.

A prompt may take several passes; its answer's queries are noted in whichever they are computed, and used in the last.
vLLM lays the tokens of a pass end to end; a token is found among them by its slot in the cache, which no other has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from kvcore.types import Tensor
from teacher_server.engines.hf.hf_attention import AnswerRows, LayerTap, answer_importance


@dataclass(frozen=True, slots=True)
class Segment:
    """A request's tokens `start` to `end` in a pass, its answer's tokens, its blocks, and the layers that count."""

    answer_A: NDArray[np.int64]
    start: int
    end: int
    blocks: list[int]
    layers: frozenset[str]


@dataclass(slots=True)
class _Kept:
    """Of one request: queries [a,Q,D] of answer tokens by layer, in order."""

    by_layer: dict[str, list[Tensor]] = field(default_factory=dict)


class AnswerQueries:
    """The answers' queries of the requests that are being computed.

    Args:
        block_size: tokens of a block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._kept: dict[str, _Kept] = {}
        self._slots: dict[str, tuple[Tensor, frozenset[str]]] = {}
        self._query: dict[str, Tensor] = {}
        # Where each request's tokens stand among those of the pass: the same in every layer.
        self._places: dict[str, Tensor] = {}

    @property
    def wanted(self) -> bool:
        """Whether this pass computes an answer's tokens."""
        return bool(self._slots)

    def begin(self, ended: Sequence[str]) -> None:
        """A pass begins; what ended is forgotten."""
        self._slots.clear()
        self._places.clear()
        self._query.clear()
        for name in ended:
            self._kept.pop(name, None)

    def add(self, name: str, segment: Segment) -> None:
        """A request's part in the pass. From its first token on it starts anew, as after a preemption."""
        if segment.start == 0 or name not in self._kept:
            self._kept[name] = _Kept()
        inside = segment.answer_A[(segment.answer_A >= segment.start) & (segment.answer_A < segment.end)]
        if inside.size:
            blocks = np.asarray(segment.blocks)[inside // self._block_size]
            slots_a = torch.from_numpy(blocks * self._block_size + inside % self._block_size)
            self._slots[name] = slots_a, segment.layers

    def seen(self, layer: str, q_TQD: Tensor) -> None:
        """The pass's queries in one layer, before its attention."""
        self._query[layer] = q_TQD

    def keep(self, layer: str, slots_T: Tensor) -> None:
        """Copies the answers' queries; `slots_T` says where each token of the pass lies in the cache."""
        q_TQD = self._query.pop(layer, None)
        if q_TQD is None:
            return
        for name, (_, layers) in self._slots.items():
            if layer in layers:
                place_a = self._place(name, slots_T)
                self._kept[name].by_layer.setdefault(layer, []).append(q_TQD[place_a])

    def _place(self, name: str, slots_T: Tensor) -> Tensor:
        """Where a request's answer stands in the pass: looked up for all requests in the first layer that asks."""
        if not self._places:
            order_T = slots_T.argsort()
            sorted_T = slots_T[order_T]
            for other, (wanted_a, _) in self._slots.items():
                self._places[other] = order_T[torch.searchsorted(sorted_T, wanted_a.to(slots_T))]
        return self._places[name]

    def take(self, layer: str, names: Sequence[str], answers: Sequence[NDArray[np.int64]]) -> BatchQueries | None:
        """The queries of requests whose prompts end; None where no plan asks for them.

        Raises:
            RuntimeError: queries are missing: their tokens were not computed.
        """
        rows = [row for row, answer_A in enumerate(answers) if answer_A.size]
        if not rows:
            return None
        longest = max(answers[row].size for row in rows)
        padded: list[Tensor] = []
        for row in rows:
            kept = self._kept[names[row]].by_layer.pop(layer, [])
            if sum(len(q) for q in kept) != answers[row].size:
                raise RuntimeError("the queries of the answer are not complete")
            q_AQD = torch.cat(kept)
            padded.append(torch.cat([q_AQD, q_AQD.new_zeros(longest - len(q_AQD), *q_AQD.shape[1:])]))
        return BatchQueries(torch.stack(padded).transpose(1, 2), rows, [answers[row].tolist() for row in rows])


@dataclass(frozen=True, slots=True)
class BatchQueries:
    """Rotated queries [b,Q,A,D] of the answers of some `rows` of a batch, and the answers' tokens."""

    q_bQAD: Tensor
    rows: list[int]
    answers: list[list[int]]

    def with_all_heads(self, gather: Callable[[Tensor], Tensor]) -> BatchQueries:
        """With every rank's query heads."""
        return BatchQueries(gather(self.q_bQAD), self.rows, self.answers)

    def importance(self, layer: int, k_BHTD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """As `LayerOutput` has it, from rotated keys of every token of the prompts; 0 for rows without an answer."""
        device = k_BHTD.device
        index_b = torch.tensor(self.rows, device=device)
        k_bHTD = k_BHTD[index_b]
        tap = LayerTap(layer, k_bHTD, k_bHTD, self.q_bQAD, k_bHTD, k_bHTD, None, scale, {})
        rows = AnswerRows.of(self.answers, device)
        places_bA = torch.arange(self.q_bQAD.shape[2], device=device).expand(len(self.rows), -1)
        largest_bHT, mean_bHT = answer_importance(tap, AnswerRows(rows.index_BA, rows.valid_BA, places_bA))
        largest_BHT = largest_bHT.new_zeros(k_BHTD.shape[:3]).index_copy(0, index_b, largest_bHT)
        return largest_BHT, torch.zeros_like(largest_BHT).index_copy(0, index_b, mean_bHT)
