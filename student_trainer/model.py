"""The module under DeepSpeed: student and alignments in, one dict of losses out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from align.aligner import Aligner, gather_slots, slots_of_tokens
from align.head_dim_adapter import TENSORS
from data.collate import StudentBatch
from fuse.fuse_kv import fuse_fixed
from kvcore.types import BatchKV, Tensor
from student_trainer.config import LossConfig, StudentConfig
from student_trainer.latent import LatentStudent
from student_trainer.losses import cross_entropy, kv_distance, normalised_error


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One micro-batch: what the student reads, and each teacher's K/V in the order of the configuration."""

    tokens: StudentBatch
    teachers: tuple[BatchKV, ...]

    def first(self, count: int) -> TrainBatch:
        """Only the first `count` samples."""
        teachers = tuple(
            BatchKV(
                None if kv.k_BLHMD is None else kv.k_BLHMD[:count],
                None if kv.v_BLHMD is None else kv.v_BLHMD[:count],
                kv.mask_BM[:count],
                kv.byte_ends_BLHM[:count],
            )
            for kv in self.teachers
        )
        return TrainBatch(self.tokens.first(count), teachers)


@dataclass(frozen=True, slots=True)
class Target:
    """What the student's K/V are compared with: [B,L,H,M,D] per tensor, masked by slot."""

    k_BLHMD: Tensor
    v_BLHMD: Tensor
    mask_BM: Tensor
    scale_LK: Tensor
    variance_LK: Tensor


class DistillModel(nn.Module):
    """A student, its alignment with each teacher, and the losses between them.

    `to_student` alignments are fused into one target in the student's space; with `to_teacher` every teacher keeps a
    target of its own, and the losses are averaged with the teachers' weights.

    Args:
        student: the model that learns.
        aligners: one per teacher, calibrated.
        weights: each teacher's name and weight, in the same order.
        settings: the student's mode.
        loss: weights and kind of the losses.
    """

    fused_scale_LK: Tensor
    fused_variance_LK: Tensor

    def __init__(
        self,
        student: LatentStudent,
        aligners: Sequence[Aligner],
        weights: dict[str, float],
        settings: StudentConfig,
        loss: LossConfig,
    ) -> None:
        super().__init__()
        self.student = student
        self.aligners = tuple(aligners)
        # DeepSpeed casts what is registered to the training dtype; frozen maps stay outside it, in fp32.
        self.trained_aligners = nn.ModuleList(a for a in aligners if any(p.requires_grad for p in a.parameters()))
        total = sum(weights.values())
        self.weights = {name: weight / total for name, weight in weights.items()}
        self._settings, self._loss = settings, loss
        self._weights_N = torch.tensor(list(self.weights.values()))
        self._frozen: dict[str, Tensor] = {}

    @property
    def fuses(self) -> bool:
        """Whether several teachers become one target: those that meet in the student's space."""
        return len(self.aligners) > 1 and self.aligners[0].direction == "to_student"

    def forward(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Scalar losses: `loss` to minimise and its parts; `kv_loss` is normalised: 1.0 is predicting the mean."""
        losses = self._latent_losses(batch) if self._settings.mode == "latent" else self._token_losses(batch)
        losses["loss"] = losses["ce_loss"]
        if "kv_objective" in losses:
            losses["loss"] = losses["ce_loss"] + self._loss.kv_weight * losses["kv_objective"]
        return losses

    def _latent_losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        tokens = batch.tokens
        logits_BAV, k_BLHMD, v_BLHMD = self.student.answer_logits(
            tokens.prompt_ids_BP, tokens.prompt_mask_BP, tokens.answer_ids_BA, tokens.answer_mask_BA
        )
        answer_ce = cross_entropy(logits_BAV, tokens.answer_ids_BA, tokens.answer_mask_BA)
        losses = {"answer_ce": answer_ce, "ce_loss": answer_ce}
        if self._loss.reasoning_ce_weight > 0 and self.training:
            logits_BTV, _ = self.student.text_logits(tokens.text_ids_BT, tokens.text_mask_BT)
            losses["reasoning_ce"] = _next_token_loss(logits_BTV, tokens)
            losses["ce_loss"] = answer_ce + self._loss.reasoning_ce_weight * losses["reasoning_ce"]
        return losses | self._kv_losses(batch.teachers, k_BLHMD, v_BLHMD)

    def _token_losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        tokens = batch.tokens
        logits_BTV, capture = self.student.text_logits(tokens.text_ids_BT, tokens.text_mask_BT)
        losses = {"ce_loss": _next_token_loss(logits_BTV, tokens)}
        if not batch.teachers:
            return losses
        k_BLHTD, v_BLHTD = capture.columns(0, tokens.text_ids_BT.shape[1])
        at_tokens = [_at_student_tokens(kv, tokens.text_byte_ends_BT) for kv in batch.teachers]
        return losses | self._kv_losses(at_tokens, k_BLHTD, v_BLHTD)

    def _kv_losses(self, teachers: Sequence[BatchKV], k_BLHMD: Tensor, v_BLHMD: Tensor) -> dict[str, Tensor]:
        if not teachers:
            return {}
        objective = error = k_BLHMD.new_zeros(())
        for aligner, target, weight in self._targets(teachers):
            for tensor in TENSORS:
                own, wanted = (k_BLHMD, target.k_BLHMD) if tensor == "k" else (v_BLHMD, target.v_BLHMD)
                view_BLHMD = aligner.student_view(own, tensor)
                column = TENSORS.index(tensor)
                scale_L, variance_L = target.scale_LK[:, column].float(), target.variance_LK[:, column].float()
                share = weight / len(TENSORS)
                objective = objective + share * kv_distance(
                    view_BLHMD, wanted, scale_L, target.mask_BM, self._loss.kv_loss
                )
                error = error + share * normalised_error(view_BLHMD, wanted, variance_L, target.mask_BM)
        return {"kv_objective": objective, "kv_loss": error}

    def _targets(self, teachers: Sequence[BatchKV]) -> list[tuple[Aligner, Target, float]]:
        if not self.fuses:
            return [
                (aligner, Target(*aligner.targets(kv), kv.mask_BM, aligner.scale_LK, aligner.variance_LK), weight)
                for aligner, kv, weight in zip(self.aligners, teachers, self.weights.values(), strict=True)
            ]
        k_BLHMD, v_BLHMD, mask_BM = self.fused(teachers)
        return [(self.aligners[0], Target(k_BLHMD, v_BLHMD, mask_BM, self.fused_scale_LK, self.fused_variance_LK), 1.0)]

    def fused(self, teachers: Sequence[BatchKV]) -> tuple[Tensor, Tensor, Tensor]:
        """k_BLHMD, v_BLHMD and mask_BM of the teachers' aligned K/V, averaged with their weights."""
        aligned = [aligner.targets(kv) for aligner, kv in zip(self.aligners, teachers, strict=True)]
        mask_NBM = torch.stack([kv.mask_BM for kv in teachers])
        weights_N = self._weights_N.to(mask_NBM.device)
        k_BLHMD, mask_BM = fuse_fixed(torch.stack([k for k, _ in aligned]), mask_NBM, weights_N)
        v_BLHMD, _ = fuse_fixed(torch.stack([v for _, v in aligned]), mask_NBM, weights_N)
        return k_BLHMD, v_BLHMD, mask_BM

    def freeze(self, fused_scale_LK: Tensor, fused_variance_LK: Tensor) -> None:
        """Takes the fused targets' scale, and remembers all that calibration fitted, for checkpoints."""
        self.load_frozen(
            {"fused/scale_LK": fused_scale_LK, "fused/variance_LK": fused_variance_LK}
            | {
                f"teacher/{name}/{key}": tensor
                for name, aligner in zip(self.weights, self.aligners, strict=True)
                for key, tensor in aligner.state_tensors().items()
            }
        )

    def frozen_state(self) -> dict[str, Tensor]:
        """What calibration fitted, as it was before the first step."""
        return self._frozen

    def load_frozen(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `frozen_state` gave."""
        self._frozen = dict(tensors)
        device = next(self.student.parameters()).device
        self.fused_scale_LK = tensors["fused/scale_LK"].to(device)
        self.fused_variance_LK = tensors["fused/variance_LK"].to(device)
        for name, aligner in zip(self.weights, self.aligners, strict=True):
            # A teacher's name may begin with another's and a dot, but holds no slash.
            prefix = f"teacher/{name}/"
            mine = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            aligner.load_state_tensors(mine)

    def report(self) -> dict[str, Any]:
        """Each teacher's alignment, ready for JSON."""
        return {name: aligner.report() for name, aligner in zip(self.weights, self.aligners, strict=True)}


def _next_token_loss(logits_BTV: Tensor, tokens: StudentBatch) -> Tensor:
    return cross_entropy(logits_BTV, tokens.text_ids_BT[:, 1:], tokens.text_target_BT[:, 1:])


def _at_student_tokens(kv: BatchKV, byte_ends_BT: Tensor) -> BatchKV:
    """A teacher's cache laid out at the student's tokens; tokens that no teacher token ends with are masked."""
    index_BT = slots_of_tokens(kv, byte_ends_BT)
    assert kv.k_BLHMD is not None
    assert kv.v_BLHMD is not None
    return BatchKV(
        gather_slots(kv.k_BLHMD, index_BT),
        gather_slots(kv.v_BLHMD, index_BT),
        index_BT >= 0,
        byte_ends_BT[:, None, None],
    )
