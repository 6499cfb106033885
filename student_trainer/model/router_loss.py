"""The router's loss: the cross-entropy of the answer with the fused K/V in place of the student's own."""

from __future__ import annotations

import torch

from data.collate import StudentBatch
from kvcore.types import Tensor
from student_trainer.model.injection import inject_kv
from student_trainer.model.latent import LatentStudent
from student_trainer.model.losses import mean_over_tokens


def router_loss(
    judge: LatentStudent, tokens: StudentBatch, k_BLHTD: Tensor, v_BLHTD: Tensor, mask_BT: Tensor
) -> Tensor:
    """Cross-entropy of the answer when a student reads the text with the given K/V at the tokens of the reasoning.

    The KV loss would train the router to pick the teacher that is easiest to imitate; the answer tells which teacher is
    right. The judge reads the reasoning as text in latent mode too: a student can answer from text long before it can
    from latents, and a judge that cannot answer yet cannot tell the teachers apart.

    Args:
        judge: the student at the time of calibration. It gets no gradient.
        tokens: prompt, reasoning and answer.
        k_BLHTD, v_BLHTD: fused K/V in the judge's space, at its tokens.
        mask_BT: True where there are fused K/V. The judge keeps its own elsewhere, and outside the reasoning.

    Returns:
        The scalar loss. Its gradient reaches only `k_BLHTD` and `v_BLHTD`.
    """
    reasoning_BT, answer_BT = reasoning_and_answer(tokens)
    k_leaf, v_leaf = (x.detach().requires_grad_() for x in (k_BLHTD, v_BLHTD))
    inputs_BTE = judge.embed(tokens.text_ids_BT).detach()
    # The block includes the backward pass, since gradient checkpointing runs the forward pass again in it.
    with torch.enable_grad(), inject_kv(judge.lm, k_leaf, v_leaf, mask_BT & reasoning_BT):
        hidden_BTE = judge.hidden(inputs_BTE, tokens.text_mask_BT)[:, :-1]
        loss_BT = judge.cross_entropy(hidden_BTE, tokens.text_ids_BT[:, 1:], answer_BT[:, 1:])
        loss = mean_over_tokens(loss_BT, answer_BT[:, 1:])
        # A backward pass through the judge would leave gradients on its parameters too.
        k_gradient, v_gradient = torch.autograd.grad(loss, (k_leaf, v_leaf))
    carrier = (k_BLHTD * k_gradient).sum() + (v_BLHTD * v_gradient).sum()
    return loss.detach() + carrier - carrier.detach()


def reasoning_and_answer(tokens: StudentBatch) -> tuple[Tensor, Tensor]:
    """reasoning_BT and answer_BT: True at the text's tokens of the reasoning, and of the answer."""
    positions_T = torch.arange(tokens.text_ids_BT.shape[1], device=tokens.text_ids_BT.device)
    answer_start_B1 = (tokens.text_mask_BT.sum(dim=1) - tokens.answer_mask_BA.sum(dim=1))[:, None]
    prompt_end_B1 = tokens.prompt_mask_BP.sum(dim=1, keepdim=True)
    reasoning_BT = (positions_T >= prompt_end_B1) & (positions_T < answer_start_B1)
    return reasoning_BT, (positions_T >= answer_start_B1) & tokens.text_mask_BT
