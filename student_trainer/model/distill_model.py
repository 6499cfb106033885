"""The module that DeepSpeed trains: a student, its alignments with teachers, and the losses between them."""

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
from student_trainer.model.latent import (
    AnswerReading,
    ContinuationReading,
    LatentStudent,
    ReadPrompt,
    TextReading,
    Thought,
)
from student_trainer.model.losses import (
    codi_loss,
    error_by_layer_and_head,
    error_by_slot,
    kv_distance,
    mean_over_tokens,
)
from student_trainer.model.router_loss import reasoning_and_answer, router_loss
from student_trainer.model.self_teacher import SelfTeacher
from student_trainer.model.teacher_weights import AlignedTeacher, Fusion


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One micro-batch: the student's tokens, and each teacher's K/V in the order of the configuration."""

    tokens: StudentBatch
    teachers: tuple[BatchKV, ...]

    def first(self, count: int) -> TrainBatch:
        """Only the first `count` samples."""
        return TrainBatch(self.tokens.first(count), tuple(kv[:count] for kv in self.teachers))


@dataclass(frozen=True, slots=True)
class _StudentKV:
    """The student's K/V that are compared, its state at the end of the prompt, and its reading of the text."""

    k_BLHMD: Tensor
    v_BLHMD: Tensor
    prompt_state_BE: Tensor
    text: TextReading | None = None


class DistillModel(nn.Module):
    """A student, its alignment with each teacher, and the losses between them.

    With `align.direction: to_student` the aligned teachers are fused into one target in the student's space. With
    `to_teacher` each teacher keeps its own target, and the losses are averaged with the teachers' weights. Targets
    carry no gradient: trainable maps on the teachers' side are trained by the router loss.

    With `self_teacher` there are no teachers: the target is the student's own reading of the reasoning as text, with
    the current weights, and `fused_scale_LK` and `fused_variance_LK` are of these targets before the first step.

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
        self.self_teacher: SelfTeacher | None = None
        if config.self_teacher:
            self.self_teacher = SelfTeacher(student.lm, config.kv.selection, config.student.latents)
        # In a list, so that it is not registered: it is neither trained, nor saved, nor sharded.
        self._judge: list[LatentStudent] = []
        if self.fusion is not None and self.fusion.learns:
            self._judge = [_frozen_copy(student, checkpointing=config.student.gradient_checkpointing)]
        self._time = None if config.align.time == "none" else TimeAligner()
        self._frozen: dict[str, Tensor] = {}
        self._align_seconds = 0.0

    def forward(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Scalar losses: `loss`, which is minimised, and its parts. `kv_loss` is 1.0 for predicting the mean.

        In evaluation, if there is a single target, also `kv_error_KLH`: `kv_loss` by tensor, layer and head. In latent
        mode also that of each latent, `kv_error_BM`, and which latents have a target, `kv_target_BM`.
        """
        losses = self._latent_losses(batch) if self._latent else self._token_losses(batch)
        weights = {
            "kv_objective": self.kv_weight,
            "codi_loss": self._loss.codi_weight,
            "step_ce": self._loss.step_ce_weight,
            "routing/router_loss": 1.0,
            "routing/entropy_reg": 1.0,
        }
        losses["loss"] = losses["ce_loss"]
        for name, weight in weights.items():
            if name in losses:
                losses["loss"] = losses["loss"] + weight * losses[name]
        return losses

    def _latent_losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        tokens, codi = batch.tokens, self._loss.codi_weight > 0 and self.training
        prompt = self.student.read_prompt(tokens.prompt_ids_BP, tokens.prompt_mask_BP, all_layers=codi)
        # With step blocks, the batch says how many latents take part.
        thought = self.student.think(prompt, tokens.step_ids_BM.shape[1] or None)
        ids_BF, mask_BF = tokens.following_ids_BF, tokens.following_mask_BF
        answer_at_B = mask_BF.sum(dim=1) - tokens.answer_mask_BA.sum(dim=1)
        answer = self.student.read_answer(thought, ids_BF, mask_BF, answer_at_B, all_layers=codi)
        losses = self._following_losses(answer, tokens, answer_at_B)
        if self._loss.step_ce_weight > 0:
            losses["step_ce"] = self._step_loss(thought, answer, tokens)
        trains_text = self._loss.reasoning_ce_weight > 0 and self.training
        target: AlignedTeacher | None = None
        if trains_text or self.self_teacher is not None:
            text, target = self._read_continuation(prompt, tokens, all_layers=codi)
            if trains_text:
                ids_BR, mask_BR = tokens.continuation_ids_BR, tokens.continuation_mask_BR
                losses["reasoning_ce"] = self._cross_entropy(text.hidden_BRE, ids_BR, mask_BR)
                losses["ce_loss"] = losses["ce_loss"] + self._loss.reasoning_ce_weight * losses["reasoning_ce"]
            if codi:
                losses["codi_loss"] = _codi_loss(answer, text, tokens)
        own = _StudentKV(answer.k_BLHMD, answer.v_BLHMD, prompt.last_state_BE)
        if target is not None:
            return losses | self._compare(own, None, target, self.fused_scale_LK, self.fused_variance_LK)
        if not batch.teachers:
            return losses
        if self.fusion is not None and self.fusion.compares:
            with torch.no_grad():
                own = replace(own, text=self.student.read_text(tokens.text_ids_BT, tokens.text_mask_BT))
        return losses | self._kv_losses(batch, own)

    def _read_continuation(
        self, prompt: ReadPrompt, tokens: StudentBatch, *, all_layers: bool
    ) -> tuple[ContinuationReading, AlignedTeacher | None]:
        """Reads reasoning and answer as text; with `self_teacher` also returns the target of the latents."""
        ids_BR, mask_BR = tokens.continuation_ids_BR, tokens.continuation_mask_BR
        if self.self_teacher is None:
            return self.student.read_continuation(prompt, ids_BR, mask_BR, all_layers=all_layers), None
        with self.self_teacher.observing(tokens) as observed:
            text = self.student.read_continuation(prompt, ids_BR, mask_BR, all_layers=all_layers)
        target = observed.target()
        if self.training and self._config.kv.control == "shuffled":
            target = AlignedTeacher(*(x.roll(1, dims=0) for x in (target.k_BLHMD, target.v_BLHMD, target.mask_BM)))
        return text, target

    def own_target(self, batch: TrainBatch) -> tuple[Tensor, Tensor, Tensor]:
        """k_BLHMD, v_BLHMD and mask_BM of the targets that `self_teacher` gives."""
        tokens = batch.tokens
        prompt = self.student.read_prompt(tokens.prompt_ids_BP, tokens.prompt_mask_BP)
        _, target = self._read_continuation(prompt, tokens, all_layers=False)
        assert target is not None, "only a self-teacher has targets of its own"
        return target.k_BLHMD, target.v_BLHMD, target.mask_BM

    def _following_losses(self, answer: AnswerReading, tokens: StudentBatch, answer_at_B: Tensor) -> dict[str, Tensor]:
        """The cross-entropy of the answer, and in a curriculum that of the steps that are still text."""
        ids_BF, mask_BF = tokens.following_ids_BF, tokens.following_mask_BF
        loss_BF = self.student.cross_entropy(answer.hidden_BAE, ids_BF, mask_BF)
        rest_BF = torch.arange(mask_BF.shape[1], device=mask_BF.device) < answer_at_B[:, None]
        answer_ce = mean_over_tokens(loss_BF, mask_BF & ~rest_BF)
        losses = {"answer_ce": answer_ce, "ce_loss": answer_ce}
        if self._config.run.curriculum_epochs is not None and self.training:
            losses["rest_ce"] = mean_over_tokens(loss_BF, rest_BF)
            losses["ce_loss"] = answer_ce + losses["rest_ce"]
        return losses

    def _step_loss(self, thought: Thought, answer: AnswerReading, tokens: StudentBatch) -> Tensor:
        """The cross-entropy of the steps from the latents after the last pass, or its mean over all passes."""
        earlier_BME = thought.earlier_BME if self._loss.step_ce_passes == "all" else ()
        found = [
            self._cross_entropy(before_BME, tokens.step_ids_BM, tokens.step_mask_BM)
            for before_BME in (*earlier_BME, answer.before_latents_BME)
        ]
        return torch.stack(found).mean()

    def _token_losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        tokens = batch.tokens
        text = self.student.read_text(tokens.text_ids_BT, tokens.text_mask_BT)
        target_BT = tokens.text_target_BT[:, 1:]
        loss_BT = self.student.cross_entropy(text.hidden_BTE[:, :-1], tokens.text_ids_BT[:, 1:], target_BT)
        _, answer_BT = reasoning_and_answer(tokens)
        losses = {
            "ce_loss": mean_over_tokens(loss_BT, target_BT),
            "answer_ce": mean_over_tokens(loss_BT.detach(), answer_BT[:, 1:]),
        }
        if not batch.teachers:
            return losses
        prompt_end_B = tokens.prompt_mask_BP.sum(dim=1) - 1
        rows_B = torch.arange(len(prompt_end_B), device=prompt_end_B.device)
        own = _StudentKV(text.k_BLHTD, text.v_BLHTD, text.hidden_BTE[rows_B, prompt_end_B])
        return losses | self._kv_losses(batch, own)

    def _cross_entropy(self, hidden_BTE: Tensor, targets_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return mean_over_tokens(self.student.cross_entropy(hidden_BTE, targets_BT, mask_BT), mask_BT)

    def _kv_losses(self, batch: TrainBatch, own: _StudentKV) -> dict[str, Tensor]:
        if self.fusion is None:
            return self._unfused_losses(batch, own)
        aligned = self._aligned(batch, own)
        weights, metrics = self.fusion.weigh(aligned, own.prompt_state_BE)
        target = AlignedTeacher(*self.fusion.fuse(self._resampled(aligned, batch), weights))
        losses = self._compare(own, self.aligners[0], target, self.fused_scale_LK, self.fused_variance_LK) | metrics
        if self.fusion.learns and self.training:
            at_text = self.fusion.fuse(self._at_text(aligned, batch), weights)
            judge = self._judge[0].to(own.k_BLHMD.device)
            losses["routing/router_loss"] = router_loss(judge, batch.tokens, *at_text)
            losses["routing/entropy_reg"] = -self._config.fuse.entropy_weight * losses["routing/entropy"]
        return losses

    def _unfused_losses(self, batch: TrainBatch, own: _StudentKV) -> dict[str, Tensor]:
        """The losses against each teacher's own target, averaged with the teachers' weights."""
        targets = self._resampled(self._aligned(batch, None), batch)
        found = [
            self._compare(own, aligner, target, aligner.scale_LK, aligner.variance_LK)
            for aligner, target in zip(self.aligners, targets, strict=True)
        ]
        if len(found) == 1:
            return found[0]
        weighted = list(zip(self.weights.values(), found, strict=True))
        return {
            name: torch.stack([weight * losses[name] for weight, losses in weighted]).sum()
            for name in ("kv_objective", "kv_loss")
        }

    def _compare(
        self, own: _StudentKV, aligner: Aligner | None, target: AlignedTeacher, scale_LK: Tensor, variance_LK: Tensor
    ) -> dict[str, Tensor]:
        """`aligner`: maps the student's K/V to the target's space; None if they are in it."""
        # In a curriculum only the first latents may exist. Each is compared with the same slot as in the last stage.
        slots = slice(own.k_BLHMD.shape[3])
        mask_BM, objectives, errors_LH, errors_BM = target.mask_BM[:, slots], [], [], []
        sides = ((own.k_BLHMD, target.k_BLHMD[:, :, :, slots]), (own.v_BLHMD, target.v_BLHMD[:, :, :, slots]))
        if self._loss.kv_scale == "none":
            scale_LK = torch.ones_like(scale_LK)
        for tensor, (own_BLHMD, target_BLHMD), scale_L, variance_L in zip(
            TENSORS, sides, scale_LK.float().T, variance_LK.float().T, strict=True
        ):
            view_BLHMD = own_BLHMD if aligner is None else aligner.student_view(own_BLHMD, tensor)
            objectives.append(kv_distance(view_BLHMD, target_BLHMD, scale_L, mask_BM, self._loss.kv_loss))
            errors_LH.append(error_by_layer_and_head(view_BLHMD, target_BLHMD, variance_L, mask_BM))
            if self._latent and not self.training:
                errors_BM.append(error_by_slot(view_BLHMD, target_BLHMD, variance_L, mask_BM))
        error_KLH = torch.stack(errors_LH)
        losses = {"kv_objective": torch.stack(objectives).mean(), "kv_loss": error_KLH.mean()}
        if not self.training:
            losses["kv_error_KLH"] = error_KLH
        if errors_BM:
            losses |= {"kv_error_BM": torch.stack(errors_BM).mean(dim=0), "kv_target_BM": mask_BM}
        return losses

    def _at_student_tokens(self, batch: TrainBatch) -> Sequence[BatchKV]:
        """The teachers' K/V: unchanged in latent mode, at the student's tokens in token mode."""
        if self._latent:
            return batch.teachers
        align, ends_BT = self._config.align, batch.tokens.text_byte_ends_BT
        return [at_student_tokens(kv, ends_BT, align.tokens, align.sink_tokens) for kv in batch.teachers]

    def _aligned(self, batch: TrainBatch, own: _StudentKV | None) -> list[AlignedTeacher]:
        """Every teacher in the student's space, with the inputs of routing if `own` is given."""
        began = time.monotonic()
        found: list[AlignedTeacher] = []
        for aligner, kv in zip(self.aligners, self._at_student_tokens(batch), strict=True):
            teacher = AlignedTeacher(*aligner.targets(kv), kv.mask_BM)
            if own is not None and self.fusion is not None and self.fusion.reads_kv:
                teacher = self._with_routing_inputs(teacher, aligner, kv, batch.tokens, own)
            found.append(teacher)
        self._align_seconds += time.monotonic() - began
        return found

    def _with_routing_inputs(
        self, teacher: AlignedTeacher, aligner: Aligner, kv: BatchKV, tokens: StudentBatch, own: _StudentKV
    ) -> AlignedTeacher:
        def standard(x_BLHMD: Tensor, column: int) -> Tensor:
            deviation_L = self.fused_variance_LK[:, column].float().sqrt()
            mean_LHD = aligner.mean(TENSORS[column])
            return (x_BLHMD.detach().float() - mean_LHD[None, :, :, None]) / deviation_L[None, :, None, None, None]

        teacher = replace(teacher, standard_k=standard(teacher.k_BLHMD, 0), standard_v=standard(teacher.v_BLHMD, 1))
        if self.fusion is None or not self.fusion.compares:
            return teacher
        if own.text is None:
            own_k, own_v, compared_BLHM = own.k_BLHMD, own.v_BLHMD, kv.mask_BM[:, None, None]
        else:
            # Concatenated, so that tokens are paired only once.
            both_BLHTD = torch.cat([own.text.k_BLHTD, own.text.v_BLHTD], dim=-1)
            both_BLHMD, compared_BLHM = at_teacher_slots(
                both_BLHTD, tokens.text_byte_ends_BT, kv, self._config.align.sink_tokens
            )
            own_k, own_v = both_BLHMD.chunk(2, dim=-1)
        compared_BLHM = compared_BLHM.expand(own_k.shape[:4])
        return replace(teacher, own_k=standard(own_k, 0), own_v=standard(own_v, 1), compared_BLHM=compared_BLHM)

    def _resampled(self, aligned: Sequence[AlignedTeacher], batch: TrainBatch) -> list[AlignedTeacher]:
        """The teachers with their slots resampled to the latents, if `align.time` asks for it."""
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
        """The teachers at the student's tokens of the text, where token mode has them already."""
        if not self._latent:
            return list(aligned)
        found: list[AlignedTeacher] = []
        for one, kv in zip(aligned, batch.teachers, strict=True):
            slots = BatchKV(one.k_BLHMD, one.v_BLHMD, one.mask_BM, kv.byte_ends_BLHM)
            text = at_student_tokens(slots, batch.tokens.text_byte_ends_BT)
            found.append(AlignedTeacher(text.k_BLHMD, text.v_BLHMD, text.mask_BM))
        return found

    def take_align_seconds(self) -> float:
        """Seconds spent on aligning teachers since the last call; on a GPU, on launching the kernels."""
        spent, self._align_seconds = self._align_seconds, 0.0
        return spent

    def fused(self, batch: TrainBatch) -> tuple[Tensor, Tensor, Tensor]:
        """k_BLHMD, v_BLHMD and mask_BM of the teachers' aligned K/V, averaged with their fixed weights."""
        assert self.fusion is not None, "a single teacher is not fused"
        return self.fusion.fuse(self._resampled(self._aligned(batch, None), batch))

    def freeze(self, fused_scale_LK: Tensor, fused_variance_LK: Tensor) -> None:
        """Sets the fused targets' scale, and keeps everything that calibration fitted for checkpoints."""
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
        """Sets the measured weight of the KV loss, which checkpoints keep."""
        self.kv_weight = weight
        self._frozen["kv_weight"] = torch.tensor(weight, dtype=torch.float64)

    def frozen_state(self) -> dict[str, Tensor]:
        """The tensors that calibration fitted, as before the first step."""
        return self._frozen

    def load_frozen(self, tensors: dict[str, Tensor]) -> None:
        """Restores the tensors of `frozen_state`."""
        self._frozen = dict(tensors)
        self.kv_weight = float(tensors["kv_weight"])
        device = next(self.student.parameters()).device
        self.fused_scale_LK = tensors["fused/scale_LK"].to(device)
        self.fused_variance_LK = tensors["fused/variance_LK"].to(device)
        for name, aligner in zip(self.weights, self.aligners, strict=True):
            # A teacher's name may start with another's name and a dot, but contains no slash.
            prefix = f"teacher/{name}/"
            mine = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            aligner.load_state_tensors(mine)

    def report(self) -> dict[str, Any]:
        """Each teacher's alignment, ready for JSON."""
        return {name: aligner.report() for name, aligner in zip(self.weights, self.aligners, strict=True)}


def _frozen_copy(student: LatentStudent, *, checkpointing: bool) -> LatentStudent:
    """The student as before the first step, which judges the K/V that were aligned with it."""
    judge = copy.deepcopy(student).requires_grad_(requires_grad=False)
    # transformers checkpoints activations only in training mode.
    return judge.train(checkpointing)


def _codi_loss(answer: AnswerReading, text: ContinuationReading, tokens: StudentBatch) -> Tensor:
    """CODI: the state before the answer after latents, against the same student's state after the reasoning as text."""
    assert answer.before_answer_BSE is not None
    assert text.states_BSRE is not None
    first_answer_B = tokens.continuation_mask_BR.sum(dim=1) - tokens.answer_mask_BA.sum(dim=1)
    rows_B = torch.arange(len(first_answer_B), device=first_answer_B.device)
    return codi_loss(answer.before_answer_BSE, text.states_BSRE[rows_B, :, first_answer_B])


_PROMPT, _REASONING, _ANSWER = range(3)
_SPANS = {"prompt": _PROMPT, "reasoning": _REASONING, "answer": _ANSWER}


def _segments(kv: BatchKV, tokens: StudentBatch, span: str) -> Tensor:
    """[B,M]: the span that each slot belongs to, -1 if it is empty.

    A slot with an unknown byte end belongs to the span of the slot before it.
    """
    if span != "all":
        return torch.where(kv.mask_BM, _SPANS[span], -1)
    assert kv.byte_ends_BLHM.shape[1:3] == (1, 1), "slots hold different tokens in different layers or heads"
    ends_BM = kv.byte_ends_BLHM[:, 0, 0].cummax(dim=1).values
    prompts_B = torch.tensor([len(record.prompt.encode()) for record in tokens.records], device=ends_BM.device)
    reasoning_B = torch.tensor([len(record.reasoning.encode()) for record in tokens.records], device=ends_BM.device)
    segment_BM = (ends_BM > prompts_B[:, None]).long() + (ends_BM > (prompts_B + reasoning_B)[:, None]).long()
    return torch.where(kv.mask_BM, segment_BM, -1)
