"""The loss that grounds routing: do the fused K/V, in place of the student's own, lead to the right answer?"""

from __future__ import annotations

import torch

from data.collate import StudentBatch
from kvcore.types import Tensor
from student_trainer.model.injection import Injection, inject_kv
from student_trainer.model.latent import LatentStudent
from student_trainer.model.losses import cross_entropy


def router_loss(
    judge: LatentStudent, tokens: StudentBatch, k_BLHTD: Tensor, v_BLHTD: Tensor, mask_BT: Tensor
) -> Tensor:
    """Cross-entropy of the answer when a student reads the written text with other K/V at its reasoning's tokens.

    A router rewarded by the KV loss would pick the teacher that is easiest to imitate; the answer tells which teacher
    is right. The text is read in latent mode too: a student can answer from written reasoning long before it can from
    latents, and a judge that cannot answer yet says nothing about teachers.

    Args:
        judge: the student that the K/V were aligned with, as it was then. It gets no gradient: only what made the K/V
            does.
        tokens: prompt, reasoning and answer.
        k_BLHTD, v_BLHTD: fused K/V in its space, at its own tokens.
        mask_BT: where they are; elsewhere, and outside the reasoning, it keeps its own.

    Returns:
        The scalar loss, whose gradient reaches `k_BLHTD` and `v_BLHTD` and nothing else.
    """
    reasoning_BT, answer_BT = places(tokens)
    k_leaf, v_leaf = (x.detach().requires_grad_() for x in (k_BLHTD, v_BLHTD))
    inputs_BTE = judge.embed(tokens.text_ids_BT).detach()
    injection = Injection(k_leaf, v_leaf, mask_BT & reasoning_BT)
    # The injection outlasts the backward, since gradient checkpointing runs the forward again in it.
    with torch.enable_grad(), inject_kv(judge.lm, injection):
        # Logits are the largest tensor of all, so only from the first answer on.
        first = int(answer_BT.any(dim=0).nonzero()[0])
        logits_BTV = judge.logits(inputs_BTE, tokens.text_mask_BT, first - 1)[:, :-1]
        loss = cross_entropy(logits_BTV, tokens.text_ids_BT[:, first:], answer_BT[:, first:])
        # By hand, since a backward through the student would leave gradients on its parameters too.
        k_gradient, v_gradient = torch.autograd.grad(loss, (k_leaf, v_leaf))
    carrier = (k_BLHTD * k_gradient).sum() + (v_BLHTD * v_gradient).sum()
    return loss.detach() + carrier - carrier.detach()


def places(tokens: StudentBatch) -> tuple[Tensor, Tensor]:
    """reasoning_BT and answer_BT: which tokens of the text are the reasoning's, and which the answer's."""
    places_T = torch.arange(tokens.text_ids_BT.shape[1], device=tokens.text_ids_BT.device)
    answer_start_B1 = (tokens.text_mask_BT.sum(dim=1) - tokens.answer_mask_BA.sum(dim=1))[:, None]
    prompt_end_B1 = tokens.prompt_mask_BP.sum(dim=1, keepdim=True)
    reasoning_BT = (places_T >= prompt_end_B1) & (places_T < answer_start_B1)
    return reasoning_BT, (places_T >= answer_start_B1) & tokens.text_mask_BT
