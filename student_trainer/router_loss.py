"""The loss that grounds routing: does the fused K/V, in place of the student's own, lead to the right answer?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data.collate import StudentBatch
from kvcore.types import Tensor
from student_trainer.injection import Injection, inject_kv
from student_trainer.latent import AnswerReading, LatentStudent
from student_trainer.losses import cross_entropy


@dataclass(frozen=True, slots=True)
class RouterLoss:
    """Cross-entropy of the answer when the student reads with fused K/V in its cache.

    A router rewarded by the KV loss would pick the teacher that is easiest to imitate; the answer tells which teacher
    is right. The student is the judge here and gets no gradient: only what made the fused K/V does.

    Args:
        student: the judge.
        inputs_BTE: what it reads, with its padding in `mask_BT`.
        columns: where K/V are injected, and at which of them they may be (`allowed_BM`).
        predicting: the columns whose logits predict `targets_BA`; `target_mask_BA` says which count.
    """

    student: LatentStudent
    inputs_BTE: Tensor
    mask_BT: Tensor
    columns: slice
    allowed_BM: Tensor
    predicting: slice
    targets_BA: Tensor
    target_mask_BA: Tensor

    @classmethod
    def of_latents(cls, student: LatentStudent, answer: AnswerReading, tokens: StudentBatch) -> RouterLoss:
        """K/V in the latents' places; the answer follows them."""
        length = answer.inputs_BTE.shape[1]
        return cls(
            student,
            answer.inputs_BTE.detach(),
            answer.mask_BT,
            answer.latents,
            answer.mask_BT[:, answer.latents],
            slice(answer.latents.stop - 1, length),
            tokens.answer_ids_BA,
            tokens.answer_mask_BA,
        )

    @classmethod
    def of_text(cls, student: LatentStudent, tokens: StudentBatch) -> RouterLoss:
        """K/V in the places of the written reasoning; the answer follows it."""
        length = tokens.text_ids_BT.shape[1]
        places_T = torch.arange(length, device=tokens.text_ids_BT.device)
        answer_start_B1 = (tokens.text_mask_BT.sum(dim=1) - tokens.answer_mask_BA.sum(dim=1))[:, None]
        prompt_end_B1 = tokens.prompt_mask_BP.sum(dim=1, keepdim=True)
        return cls(
            student,
            student.embed(tokens.text_ids_BT).detach(),
            tokens.text_mask_BT,
            slice(0, length),
            (places_T >= prompt_end_B1) & (places_T < answer_start_B1),
            slice(0, length - 1),
            tokens.text_ids_BT[:, 1:],
            ((places_T >= answer_start_B1) & tokens.text_mask_BT)[:, 1:],
        )

    def __call__(self, k_BLHMD: Tensor, v_BLHMD: Tensor, mask_BM: Tensor) -> Tensor:
        """The scalar loss, whose gradient reaches the injected K/V and nothing of the student."""
        k_leaf, v_leaf = (x.detach().requires_grad_() for x in (k_BLHMD, v_BLHMD))
        injection = Injection(self.columns, k_leaf, v_leaf, mask_BM & self.allowed_BM)
        # The injection outlasts the backward, since gradient checkpointing runs the forward again in it.
        with torch.enable_grad(), inject_kv(self.student.lm, injection):
            logits_BTV = self.student.logits(self.inputs_BTE, self.mask_BT)
            loss = cross_entropy(logits_BTV[:, self.predicting], self.targets_BA, self.target_mask_BA)
            # By hand, since a backward through the student would leave gradients on its parameters too.
            k_gradient, v_gradient = torch.autograd.grad(loss, (k_leaf, v_leaf))
        carrier = (k_BLHMD * k_gradient).sum() + (v_BLHMD * v_gradient).sum()
        return loss.detach() + carrier - carrier.detach()
