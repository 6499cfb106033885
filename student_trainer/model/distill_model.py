"""The module under DeepSpeed: student and alignments in, one dict of losses out."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from align.aligner import Aligner
from align.time_align import TimeAligner
from align.token_layout import at_student_tokens, at_teacher_slots
from data.collate import StudentBatch
from kvcore.types import TENSORS, BatchKV, Tensor
from student_trainer.config import TrainConfig
from student_trainer.model.latent import AnswerReading, LatentStudent, TextReading
from student_trainer.model.losses import codi_loss, cross_entropy, error_by_layer_and_head, kv_distance
from student_trainer.model.router_loss import router_loss
from student_trainer.model.teacher_weights import AlignedTeacher, Fusion


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One micro-batch: what the student reads, and each teacher's K/V in the order of the configuration."""

    tokens: StudentBatch
    teachers: tuple[BatchKV, ...]

    def first(self, count: int) -> TrainBatch:
        """Only the first `count` samples."""
        return TrainBatch(self.tokens.first(count), tuple(kv[:count] for kv in self.teachers))


@dataclass(frozen=True, slots=True)
class Target:
    """What the student's K/V are compared with: [B,L,H,M,D] per tensor, masked by slot."""

    k_BLHMD: Tensor
    v_BLHMD: Tensor
    mask_BM: Tensor
    scale_LK: Tensor
    variance_LK: Tensor


@dataclass(frozen=True, slots=True)
class _OwnKV:
    """The student's K/V that are compared, its state at the prompt's end, and its reading of the text beside them."""

    k_BLHMD: Tensor
    v_BLHMD: Tensor
    prompt_state_BE: Tensor
    text: TextReading | None = None


class DistillModel(nn.Module):
    """A student, its alignment with each teacher, and the losses between them.

    `to_student` alignments are fused into one target in the student's space; with `to_teacher` every teacher keeps a
    target of its own, and the losses are averaged with the teachers' weights. Targets carry no gradient: what trains on
    their side is trained by the router loss.

    Args:
        student: the model that learns.
        aligners: one per teacher, calibrated.
        weights: each teacher's name and weight, in the same order.
        config: the student's mode, and how K/V are aligned, fused and compared.
    """

    fused_scale_LK: Tensor
    fused_variance_LK: Tensor

    def __init__(
        self, student: LatentStudent, aligners: Sequence[Aligner], weights: dict[str, float], config: TrainConfig
    ) -> None:
        super().__init__()
        self.student = student
        self.aligners = tuple(aligners)
        # DeepSpeed casts what is registered to the training dtype; frozen maps stay outside it, in fp32.
        self.trained_aligners = nn.ModuleList(a for a in aligners if any(p.requires_grad for p in a.parameters()))
        total = sum(weights.values())
        self.weights = {name: weight / total for name, weight in weights.items()}
        self._config, self._loss, self._latent = config, config.loss, config.student.mode == "latent"
        self.kv_weight = 1.0 if config.loss.kv_weight == "auto" else config.loss.kv_weight
        self.fusion: Fusion | None = None
        if aligners and aligners[0].direction == "to_student" and (len(aligners) > 1 or config.fuse.kind != "fixed"):
            self.fusion = Fusion(config.fuse, self.weights, aligners[0].student, int(student.lm.config.hidden_size))
        # In a list, for nothing of it trains, is saved or is sharded.
        self._judge: list[LatentStudent] = []
        if self.fusion is not None and self.fusion.learns:
            self._judge = [_frozen_copy(student, checkpointing=config.student.gradient_checkpointing)]
        self._time = None if config.align.time == "none" else TimeAligner(config.align.time)
        self._frozen: dict[str, Tensor] = {}
        self._align_seconds = 0.0

    def forward(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Scalar losses: `loss` to minimise and its parts; `kv_loss` is normalised: 1.0 is predicting the mean.

        In evaluation also `kv_error_KLH`: the same by tensor, layer and head, where teachers share one target.
        """
        losses = self._latent_losses(batch) if self._latent else self._token_losses(batch)
        losses["loss"] = losses["ce_loss"]
        if "kv_objective" in losses:
            losses["loss"] = losses["loss"] + self.kv_weight * losses["kv_objective"]
        if "codi_loss" in losses:
            losses["loss"] = losses["loss"] + self._loss.codi_weight * losses["codi_loss"]
        if "routing/router_loss" in losses:
            fuse = self._config.fuse
            losses["loss"] = losses["loss"] + fuse.router_loss_weight * losses["routing/router_loss"]
            losses["loss"] = losses["loss"] + losses["routing/entropy_reg"]
        return losses

    def _latent_losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        tokens, codi = batch.tokens, self._loss.codi_weight > 0 and self.training
        answer = self.student.read_answer(
            tokens.prompt_ids_BP,
            tokens.prompt_mask_BP,
            tokens.answer_ids_BA,
            tokens.answer_mask_BA,
            all_layers=codi,
        )
        answer_ce = cross_entropy(answer.logits_BAV, tokens.answer_ids_BA, tokens.answer_mask_BA)
        losses = {"answer_ce": answer_ce, "ce_loss": answer_ce}
        text = None
        if self._loss.reasoning_ce_weight > 0 and self.training:
            text = self.student.read_text(tokens.text_ids_BT, tokens.text_mask_BT, all_layers=codi)
            losses["reasoning_ce"] = _next_token_loss(text.logits_BTV, tokens)
            losses["ce_loss"] = answer_ce + self._loss.reasoning_ce_weight * losses["reasoning_ce"]
            if codi:
                losses["codi_loss"] = _codi_loss(answer, text, tokens)
        if not batch.teachers:
            return losses
        own = _OwnKV(answer.k_BLHMD, answer.v_BLHMD, answer.prompt_state_BE)
        if self.fusion is not None and self.fusion.compares:
            own = replace(own, text=self._read_quietly(tokens) if text is None else text)
        return losses | self._kv_losses(batch, own)

    @torch.no_grad()
    def _read_quietly(self, tokens: StudentBatch) -> TextReading:
        return self.student.read_text(tokens.text_ids_BT, tokens.text_mask_BT, predict=False)

    def _token_losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        tokens = batch.tokens
        text = self.student.read_text(tokens.text_ids_BT, tokens.text_mask_BT)
        losses = {"ce_loss": _next_token_loss(text.logits_BTV, tokens)}
        if not batch.teachers:
            return losses
        prompt_end_B = tokens.prompt_mask_BP.sum(dim=1) - 1
        rows_B = torch.arange(len(prompt_end_B), device=prompt_end_B.device)
        own = _OwnKV(text.k_BLHTD, text.v_BLHTD, text.hidden_BTE[rows_B, prompt_end_B])
        return losses | self._kv_losses(batch, own)

    def _kv_losses(self, batch: TrainBatch, own: _OwnKV) -> dict[str, Tensor]:
        if self.fusion is None:
            return self._compare(own, self._targets(batch))
        aligned = self._aligned(batch, own)
        found = self.fusion.weigh(aligned, own.prompt_state_BE)
        k_BLHMD, v_BLHMD, mask_BM = self.fusion.fuse(self._resampled(aligned, batch), found.weights)
        target = Target(k_BLHMD.detach(), v_BLHMD.detach(), mask_BM, self.fused_scale_LK, self.fused_variance_LK)
        losses = self._compare(own, [(self.aligners[0], target, 1.0)])
        if self.fusion.settings.kind != "fixed":
            losses |= self.fusion.metrics(found)
        if self.fusion.learns and self.training:
            at_text = self.fusion.fuse(self._at_text(aligned, batch), found.weights)
            judge = self._judge[0].to(own.k_BLHMD.device)
            losses["routing/router_loss"] = router_loss(judge, batch.tokens, *at_text)
            losses["routing/entropy_reg"] = -self._config.fuse.entropy_weight * losses["routing/entropy"]
        return losses

    def _compare(self, own: _OwnKV, targets: Sequence[tuple[Aligner, Target, float]]) -> dict[str, Tensor]:
        objective = own.k_BLHMD.new_zeros(())
        error = own.k_BLHMD.new_zeros(())
        by_head: list[Tensor] = []
        for aligner, target, weight in targets:
            for column, tensor in enumerate(TENSORS):
                mine, wanted = (own.k_BLHMD, target.k_BLHMD) if tensor == "k" else (own.v_BLHMD, target.v_BLHMD)
                view_BLHMD = aligner.student_view(mine, tensor)
                scale_L, variance_L = target.scale_LK[:, column].float(), target.variance_LK[:, column].float()
                share = weight / len(TENSORS)
                objective = objective + share * kv_distance(
                    view_BLHMD, wanted, scale_L, target.mask_BM, self._loss.kv_loss
                )
                by_head.append(error_by_layer_and_head(view_BLHMD, wanted, variance_L, target.mask_BM))
                error = error + share * by_head[-1].mean()
        losses = {"kv_objective": objective, "kv_loss": error}
        if len(targets) == 1 and not self.training:
            losses["kv_error_KLH"] = torch.stack(by_head)
        return losses

    def _targets(self, batch: TrainBatch) -> list[tuple[Aligner, Target, float]]:
        """Each teacher's own target; as it has a map of its own, targets of several are not fused."""
        found: list[tuple[Aligner, Target, float]] = []
        aligned = self._resampled(self._aligned(batch, None), batch)
        for aligner, one, weight in zip(self.aligners, aligned, self.weights.values(), strict=True):
            k_BLHMD, v_BLHMD = one.k_BLHMD.detach(), one.v_BLHMD.detach()
            target = Target(k_BLHMD, v_BLHMD, one.mask_BM, aligner.scale_LK, aligner.variance_LK)
            found.append((aligner, target, weight))
        return found

    def _laid_out(self, batch: TrainBatch) -> Sequence[BatchKV]:
        """The teachers' caches: as they came in latent mode, at the student's tokens in token mode."""
        if self._latent:
            return batch.teachers
        align, ends_BT = self._config.align, batch.tokens.text_byte_ends_BT
        return [at_student_tokens(kv, ends_BT, align.tokens, align.sink_tokens) for kv in batch.teachers]

    def _aligned(self, batch: TrainBatch, own: _OwnKV | None) -> list[AlignedTeacher]:
        """Every teacher in the student's space; with what routing compares, if `own` is given and it does."""
        began = time.monotonic()
        found: list[AlignedTeacher] = []
        for aligner, kv in zip(self.aligners, self._laid_out(batch), strict=True):
            one = AlignedTeacher(*aligner.targets(kv), kv.mask_BM)
            if own is not None and self.fusion is not None and self.fusion.reads_kv:
                one = self._standardised(one, aligner, kv, batch.tokens, own)
            found.append(one)
        self._align_seconds += time.monotonic() - began
        return found

    def _standardised(
        self, one: AlignedTeacher, aligner: Aligner, kv: BatchKV, tokens: StudentBatch, own: _OwnKV
    ) -> AlignedTeacher:
        def standard(x_BLHMD: Tensor, column: int) -> Tensor:
            deviation_L = self.fused_variance_LK[:, column].float().sqrt()
            mean_LHD = aligner.mean(TENSORS[column])
            return (x_BLHMD.detach().float() - mean_LHD[None, :, :, None]) / deviation_L[None, :, None, None, None]

        one = replace(one, standard_k=standard(one.k_BLHMD, 0), standard_v=standard(one.v_BLHMD, 1))
        if self.fusion is None or not self.fusion.compares:
            return one
        if own.text is None:
            own_k, own_v, compared_BLHM = own.k_BLHMD, own.v_BLHMD, kv.mask_BM[:, None, None]
        else:
            # Side by side, so that tokens are paired once.
            both_BLHTD = torch.cat([own.text.k_BLHTD, own.text.v_BLHTD], dim=-1)
            both_BLHMD, compared_BLHM = at_teacher_slots(
                both_BLHTD, tokens.text_byte_ends_BT, kv, self._config.align.sink_tokens
            )
            own_k, own_v = both_BLHMD.chunk(2, dim=-1)
        compared_BLHM = compared_BLHM.expand(own_k.shape[:4])
        return replace(one, own_k=standard(own_k, 0), own_v=standard(own_v, 1), compared_BLHM=compared_BLHM)

    def _resampled(self, aligned: Sequence[AlignedTeacher], batch: TrainBatch) -> list[AlignedTeacher]:
        """With as many slots as the student has latents, where the run resamples."""
        if self._time is None:
            return list(aligned)
        found: list[AlignedTeacher] = []
        for one, kv in zip(aligned, batch.teachers, strict=True):
            source_BM = _segments(kv, batch.tokens, self._config.kv.selection.span)
            target_BS = torch.full((len(source_BM), self._config.student.latents), _REASONING, device=source_BM.device)
            k_BLHMD, mask_BM = self._time.resample(one.k_BLHMD, source_BM, target_BS)
            v_BLHMD, _ = self._time.resample(one.v_BLHMD, source_BM, target_BS)
            found.append(AlignedTeacher(k_BLHMD, v_BLHMD, mask_BM))
        return found

    def _at_text(self, aligned: Sequence[AlignedTeacher], batch: TrainBatch) -> list[AlignedTeacher]:
        """At the student's tokens of the written text, where slots are not its tokens already."""
        if not self._latent:
            return list(aligned)
        found: list[AlignedTeacher] = []
        for one, kv in zip(aligned, batch.teachers, strict=True):
            slots = BatchKV(one.k_BLHMD, one.v_BLHMD, one.mask_BM, kv.byte_ends_BLHM)
            text = at_student_tokens(slots, batch.tokens.text_byte_ends_BT)
            found.append(AlignedTeacher(text.k_BLHMD, text.v_BLHMD, text.mask_BM))
        return found

    def take_align_seconds(self) -> float:
        """How long bringing teachers into the student's space took since the last call; on a GPU, to launch it."""
        spent, self._align_seconds = self._align_seconds, 0.0
        return spent

    def fused(self, batch: TrainBatch) -> tuple[Tensor, Tensor, Tensor]:
        """k_BLHMD, v_BLHMD and mask_BM of the teachers' aligned K/V, averaged with their fixed weights."""
        assert self.fusion is not None, "one teacher alone is not fused"
        return self.fusion.fuse(self._resampled(self._aligned(batch, None), batch))

    def freeze(self, fused_scale_LK: Tensor, fused_variance_LK: Tensor) -> None:
        """Takes the fused targets' scale, and remembers all that calibration fitted, for checkpoints."""
        self.load_frozen(
            {
                "fused/scale_LK": fused_scale_LK,
                "fused/variance_LK": fused_variance_LK,
                "kv_weight": torch.tensor(self.kv_weight, dtype=torch.float64),
            }
            | {
                f"teacher/{name}/{key}": tensor
                for name, aligner in zip(self.weights, self.aligners, strict=True)
                for key, tensor in aligner.state_tensors().items()
            }
        )

    def set_kv_weight(self, weight: float) -> None:
        """Takes the measured weight of the KV loss, which checkpoints keep."""
        self.kv_weight = weight
        self._frozen["kv_weight"] = torch.tensor(weight, dtype=torch.float64)

    def frozen_state(self) -> dict[str, Tensor]:
        """What calibration fitted, as it was before the first step."""
        return self._frozen

    def load_frozen(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `frozen_state` gave."""
        self._frozen = dict(tensors)
        self.kv_weight = float(tensors["kv_weight"])
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


def _frozen_copy(student: LatentStudent, *, checkpointing: bool) -> LatentStudent:
    """The student as it is before the first step, to judge K/V that were aligned with it."""
    judge = copy.deepcopy(student).requires_grad_(requires_grad=False)
    # transformers checkpoints activations in training mode alone.
    return judge.train(checkpointing)


def _next_token_loss(logits_BTV: Tensor, tokens: StudentBatch) -> Tensor:
    return cross_entropy(logits_BTV, tokens.text_ids_BT[:, 1:], tokens.text_target_BT[:, 1:])


def _codi_loss(answer: AnswerReading, text: TextReading, tokens: StudentBatch) -> Tensor:
    """CODI: the state before the answer, after latents, against the same student's after the written reasoning."""
    assert answer.before_answer_BSE is not None
    assert text.states_BSTE is not None
    first_answer_B = tokens.text_mask_BT.sum(dim=1) - tokens.answer_mask_BA.sum(dim=1)
    rows_B = torch.arange(len(first_answer_B), device=first_answer_B.device)
    return codi_loss(answer.before_answer_BSE, text.states_BSTE[rows_B, :, first_answer_B - 1])


_PROMPT, _REASONING, _ANSWER = range(3)
_SPANS = {"prompt": _PROMPT, "reasoning": _REASONING, "answer": _ANSWER}


def _segments(kv: BatchKV, tokens: StudentBatch, span: str) -> Tensor:
    """[B,M]: which part of its record each slot belongs to, -1 where it is empty.

    A slot whose token's end can't be told belongs with the slot before it.
    """
    if span != "all":
        return torch.where(kv.mask_BM, _SPANS[span], -1)
    assert kv.byte_ends_BLHM.shape[1:3] == (1, 1), "slots hold different tokens in different layers or heads"
    ends_BM = kv.byte_ends_BLHM[:, 0, 0].cummax(dim=1).values
    prompts_B = torch.tensor([len(record.prompt.encode()) for record in tokens.records], device=ends_BM.device)
    reasoning_B = torch.tensor([len(record.reasoning.encode()) for record in tokens.records], device=ends_BM.device)
    segment_BM = (ends_BM > prompts_B[:, None]).long() + (ends_BM > (prompts_B + reasoning_B)[:, None]).long()
    return torch.where(kv.mask_BM, segment_BM, -1)
