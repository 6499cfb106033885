"""The reference for tests and benchmarks: every latent pass reads the whole sequence, and logits are never chunked."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, pad

from kvcore.types import Tensor
from student_trainer.model.capture import capture_kv
from student_trainer.model.latent import LatentStudent


def naive_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over samples of the mean over a sample's masked-in tokens."""
    loss_BT = cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)
    return ((loss_BT * mask_BT).sum(dim=1) / mask_BT.sum(dim=1)).mean()


def latents_of(student: LatentStudent, ids_BP: Tensor, mask_BP: Tensor) -> Tensor:
    """The input embeddings [B,P+M,E] of prompts and latents."""
    prompt_BPE = student.embed(ids_BP)
    latents = student.reasoning.latents
    latents_BME = student.reasoning.first_inputs(torch.arange(latents)).expand(len(ids_BP), -1, -1)
    mask_BT = pad(mask_BP, (0, latents), value=True)
    for _ in range(student.reasoning.passes):
        hidden_BTE = student.hidden(torch.cat([prompt_BPE, latents_BME], dim=1), mask_BT)
        latents_BME = student.reasoning.projection(hidden_BTE[:, ids_BP.shape[1] - 1 : -1])
    return torch.cat([prompt_BPE, latents_BME], dim=1)


def answer_reading(
    student: LatentStudent, ids_BP: Tensor, mask_BP: Tensor, ids_BA: Tensor, mask_BA: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The states that predict the answer, and the latents' keys and values."""
    inputs_BTE = latents_of(student, ids_BP, mask_BP)
    start, end = ids_BP.shape[1], inputs_BTE.shape[1]
    mask_BT = torch.cat([pad(mask_BP, (0, end - start), value=True), mask_BA[:, :-1]], dim=1)
    with capture_kv(student.lm) as capture:
        hidden_BTE = student.hidden(torch.cat([inputs_BTE, student.embed(ids_BA[:, :-1])], dim=1), mask_BT)
    return hidden_BTE[:, end - 1 :], *capture.columns(start, end)
