"""A student that is its own teacher: its K/V of the written reasoning are the target of its latents.

The same weights read reasoning and answer as text, in the pass that trains the text's cross-entropy. This module
observes that pass: it takes every layer's content keys and values of the reasoning, and the attention that the answer
pays to them, and selects tokens as a teacher server does. Nothing is aligned, because both sides are one model. Source:
KaVa (arXiv 2510.02312).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from align.head_dim_adapter import KVGeometry
from data.collate import StudentBatch
from kvcore.models.attention_taps import ATTENTION_NAME, AnswerRows, LayerTap, answer_importance, tapped
from kvcore.plan import Selection
from kvcore.tensors.projections import kv_projections, unsupported
from kvcore.tensors.select import needs_importance, needs_seeds, select_layers
from kvcore.tensors.selectors.random import sample_seed
from kvcore.types import Tensor
from student_trainer.model.teacher_weights import AlignedTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SelfTeacher:
    """Makes the targets of the latents from the student's own reading of the reasoning.

    Args:
        lm: the student's language model. Its attention becomes one that computes the same and can be observed.
        selection: which tokens of the reasoning are targets.
        latents: M, the slots of a target.
    """

    def __init__(self, lm: PreTrainedModel, selection: Selection, latents: int) -> None:
        lm.set_attn_implementation(ATTENTION_NAME)
        self.geometry = geometry_of(lm)
        self._lm, self._selection, self._latents = lm, selection, latents

    @contextmanager
    def observing(self, tokens: StudentBatch) -> Iterator[ObservedReading]:
        """Inside the block, observes one `LatentStudent.read_continuation` of the batch.

        Raises:
            UnsupportedModelError: a layer's attention cannot be observed.
        """
        observed = ObservedReading(tokens, self._selection, self._latents)
        with tapped(kv_projections(self._lm), observed.receive):
            yield observed
        if observed.layers != self.geometry.layers:
            found = f"the attention of {observed.layers} of {self.geometry.layers} layers can be observed"
            raise unsupported(type(self._lm).__name__, found)


def geometry_of(lm: PreTrainedModel) -> KVGeometry:
    """The shape of a language model's K/V.

    Raises:
        UnsupportedModelError: its keys and values can't be captured.
    """
    projections = kv_projections(lm)
    heads = int(getattr(lm.config, "num_key_value_heads", None) or lm.config.num_attention_heads)
    return KVGeometry(len(projections), heads, projections[0].head_dim)


class ObservedReading:
    """What was observed of a batch's pass over reasoning and answer. It holds no gradient."""

    def __init__(self, tokens: StudentBatch, selection: Selection, latents: int) -> None:
        self._tokens, self._selection, self._latents = tokens, selection, latents
        # The end of sequence is no part of the answer that ranks the tokens, as with other teachers.
        answers_B = tokens.answer_mask_BA.sum(dim=1) - 1
        reasoning_B = tokens.continuation_mask_BR.sum(dim=1) - answers_B - 1
        self._counts: list[int] = reasoning_B.tolist()
        self._answer = _answer_rows(reasoning_B, answers_B) if needs_importance(selection) else None
        self._k_BHND: list[Tensor] = []
        self._v_BHND: list[Tensor] = []
        self._importance_BHN: list[Tensor] = []

    @property
    def layers(self) -> int:
        """How many layers were observed."""
        return len(self._k_BHND)

    @torch.no_grad()
    def receive(self, tap: LayerTap) -> None:
        """Takes the next layer: its keys and values of the reasoning, and the answer's attention to these tokens."""
        longest = max(self._counts)
        self._k_BHND.append(tap.k_BHTD[:, :, :longest].float())
        self._v_BHND.append(tap.v_BHTD[:, :, :longest].float())
        if self._answer is not None:
            # The keys of the prompt, which was read before, come first.
            prompt = tap.rotated_k_BHTD.shape[2] - tap.k_BHTD.shape[2]
            answer = AnswerRows(self._answer.index_BA + prompt, self._answer.valid_BA, self._answer.query_BA)
            largest_BHT, mean_BHT = answer_importance(tap, answer)
            importance_BHT = largest_BHT if self._selection.importance_pool == "max" else mean_BHT
            self._importance_BHN.append(importance_BHT[:, :, prompt : prompt + longest])

    @torch.no_grad()
    def target(self) -> AlignedTeacher:
        """K/V of the selected tokens, in time order; a sample with fewer tokens than slots has empty slots."""
        k_BLHND, v_BLHND = torch.stack(self._k_BHND, dim=1), torch.stack(self._v_BHND, dim=1)
        importance_BLHN = torch.stack(self._importance_BHN, dim=1) if self._importance_BHN else None
        seeds_B = self._seeds() if needs_seeds(self._selection) else None
        shape = (*k_BLHND.shape[:3], self._latents, k_BLHND.shape[4])
        k_BLHMD, v_BLHMD = k_BLHND.new_zeros(shape), v_BLHND.new_zeros(shape)
        mask_BM = torch.zeros(len(k_BLHND), self._latents, dtype=torch.bool, device=k_BLHND.device)
        # A call of a selector takes samples with equally many candidates.
        for count in sorted(set(self._counts) - {0}):
            rows_b = torch.tensor([row for row, n in enumerate(self._counts) if n == count], device=k_BLHND.device)
            index_bLHM = _positions(self._selection, count, rows_b, k_BLHND, importance_BLHN, seeds_B)
            kept = index_bLHM.shape[3]
            for source_BLHND, target_BLHMD in ((k_BLHND, k_BLHMD), (v_BLHND, v_BLHMD)):
                chosen_bLHMD = source_BLHND[rows_b].gather(3, index_bLHM[..., None].expand(*index_bLHM.shape, shape[4]))
                target_BLHMD[rows_b, :, :, :kept] = chosen_bLHMD
            mask_BM[rows_b, :kept] = True
        return AlignedTeacher(k_BLHMD, v_BLHMD, mask_BM)

    def _seeds(self) -> Tensor:
        """[B]: each sample's seed of the selector `random`, from its text."""
        ids_BT, mask_BT = self._tokens.text_ids_BT, self._tokens.text_mask_BT
        texts = [ids_T[mask_T].tolist() for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)]
        seeds = [sample_seed(self._selection.seed, text) for text in texts]
        return torch.tensor(seeds, dtype=torch.int64, device=ids_BT.device)


def _answer_rows(reasoning_B: Tensor, answers_B: Tensor) -> AnswerRows:
    """The answer's tokens by their places in the continuation, which is read after the reasoning."""
    place_A = torch.arange(max(1, int(answers_B.max())), device=answers_B.device)
    valid_BA = place_A < answers_B[:, None]
    query_BA = torch.where(valid_BA, reasoning_B[:, None] + place_A, 0)
    return AnswerRows(query_BA, valid_BA, query_BA)


def _positions(
    selection: Selection,
    count: int,
    rows_b: Tensor,
    k_BLHND: Tensor,
    importance_BLHN: Tensor | None,
    seeds_B: Tensor | None,
) -> Tensor:
    """[b,L,H,M]: the places of the selected tokens of some rows with `count` tokens of reasoning."""
    candidates_bN = torch.arange(count, device=k_BLHND.device).expand(len(rows_b), -1)
    # Numbers that are not finite stay in the targets, so that the loss shows them on every rank alike.
    k_bLHND = k_BLHND[rows_b].nan_to_num(posinf=0.0, neginf=0.0)
    importance_bLHN = None if importance_BLHN is None else importance_BLHN[rows_b].nan_to_num()
    seeds_b = None if seeds_B is None else seeds_B[rows_b]
    index_bLHM = select_layers(selection, candidates_bN, k_bLHND, importance_bLHN, seeds_b).long()
    return index_bLHM.expand(-1, k_BLHND.shape[1], k_BLHND.shape[2], -1)
