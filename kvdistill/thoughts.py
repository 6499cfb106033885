"""The latents of a student after every pass, and the tokens that the language-model head predicts in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvcore.types import Tensor
from student_trainer.model.generation import left_padded
from student_trainer.model.latent import LatentStudent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class LatentToken:
    """A token that the model would write in the place of a latent, and its probability."""

    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class Thoughts:
    """What a student thinks about one prompt.

    `latents_TME`: the latents after each of T passes, as input embeddings. `tokens`: by pass, then by latent, the most
    likely tokens, best first.
    """

    latents_TME: Tensor
    tokens: tuple[tuple[tuple[LatentToken, ...], ...], ...]

    def text(self, number: int = -1) -> str:
        """The most likely tokens after one pass in a row; by default after the last."""
        return "".join(of_latent[0].text for of_latent in self.tokens[number])


@torch.inference_mode()
def think(
    student: LatentStudent, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[Sequence[int]], top: int
) -> list[Thoughts]:
    """Computes the latents of a batch of prompts.

    A latent is the last hidden state one position before it, or a projection of it. The head reads the same state as
    the token that would stand in the latent's place.
    """
    passes: list[tuple[Tensor, Tensor]] = []

    def keep(_module: object, given: Any, latents_BME: Any) -> None:
        passes.append((given[0], latents_BME))

    hook = student.reasoning.projection.register_forward_hook(keep)
    try:
        student.think(student.read_prompt(*left_padded(prompt_ids, student.lm.device)))
    finally:
        hook.remove()
    latents_TBME = torch.stack([latents_BME for _, latents_BME in passes]).cpu()
    likeliest = [student.logits(before_BME).float().softmax(dim=-1).topk(top) for before_BME, _ in passes]
    found = [_tokens(tokenizer, best.values.tolist(), best.indices.tolist()) for best in likeliest]
    return [Thoughts(latents_TBME[:, row], tuple(of_pass[row] for of_pass in found)) for row in range(len(prompt_ids))]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, probabilities_BMK: list[Any], ids_BMK: list[Any]
) -> list[tuple[tuple[LatentToken, ...], ...]]:
    return [
        tuple(
            tuple(LatentToken(token_text(tokenizer, token), value) for token, value in zip(ids, values, strict=True))
            for ids, values in zip(ids_MK, values_MK, strict=True)
        )
        for ids_MK, values_MK in zip(ids_BMK, probabilities_BMK, strict=True)
    ]


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token, with the space that SentencePiece's decoder drops at the start of a text."""
    text = str(tokenizer.decode([token]))
    piece = str(tokenizer.convert_ids_to_tokens(token))
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text
