"""lm-eval interface of a student that reasons in latents: prompt, latents, continuation.

Every request first computes the latents of its prompt. Text is generated after the latents, and the log-likelihood of a
continuation is conditioned on them, so that all choices of a question are scored after the same latents. Text without a
prompt has no likelihood.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch.nn.utils.rnn import pad_sequence

from kvcore.errors import KVDistillError
from kvcore.types import Tensor
from student_trainer.model.latent import LatentReasoning, LatentStudent

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LogLikelihood = tuple[float, bool]
# lm-eval's decorator hides the type of the class.
_HFLM: Any = HFLM
Pair = tuple[tuple[str, str], list[int], list[int]]


class NoLikelihoodError(KVDistillError):
    """A task needs the likelihood of text without a prompt, which a latent student does not have."""


@dataclass(frozen=True, slots=True)
class _Question:
    """One prompt, its continuations, and the indices of their requests."""

    prompt: tuple[int, ...]
    continuations: list[list[int]]
    indices: list[int]


class LatentLM(_HFLM):
    """A latent student with lm-eval's model interface.

    Args:
        lm: the student's language model, on its device.
        reasoning: its latent reasoning module.
        tokenizer: its tokenizer.
        batch_size: prompts per batch.
    """

    def __init__(
        self, lm: PreTrainedModel, reasoning: LatentReasoning, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> None:
        super().__init__(lm, tokenizer=tokenizer, batch_size=batch_size)
        self.student = LatentStudent(lm, reasoning).eval()

    @property
    def max_length(self) -> int:
        """Maximum number of text tokens: the context length minus the latents."""
        return super().max_length - self.student.reasoning.latents

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenises prompt and continuation separately, as in training, since the latents come between them."""
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)

    @torch.no_grad()
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Prompt and continuation [B,P+A] for left-padded prompts [B,P]."""
        inputs_BTE, mask_BT = self.student.think(context, generation_kwargs.pop("attention_mask").bool())
        if not generation_kwargs.get("do_sample"):
            generation_kwargs = {"do_sample": False}
        completion_BA = self.model.generate(
            inputs_embeds=inputs_BTE,
            attention_mask=mask_BT.long(),
            max_new_tokens=max_length - context.shape[1],
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, 0, len(context)),
            pad_token_id=self.tokenizer.pad_token_id,
            **generation_kwargs,
        )
        return torch.cat([context, completion_BA], dim=1)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[LogLikelihood]:
        del disable_tqdm
        results: list[LogLikelihood | None] = [None] * len(requests)
        size = override_bs or self.batch_size_per_gpu
        questions = sorted(_questions(requests), key=lambda question: -len(question.prompt))
        for start in range(0, len(questions), size):
            for index, found in self._score(questions[start : start + size]):
                results[index] = found
        assert None not in results
        return results  # pyright: ignore[reportReturnType]

    def _score(self, questions: Sequence[_Question]) -> Iterator[tuple[int, LogLikelihood]]:
        """Computes the latents of each question once, then scores its continuations."""
        prompts = [torch.tensor(question.prompt[-self.max_length :]) for question in questions]
        ids_BP = pad_sequence(prompts, batch_first=True, padding_side="left").to(self.device)
        lengths_B = torch.tensor([len(prompt) for prompt in prompts])
        mask_BP = (torch.arange(ids_BP.shape[1]) >= ids_BP.shape[1] - lengths_B[:, None]).to(self.device)
        inputs_BTE, mask_BT = self.student.think(ids_BP, mask_BP)
        rows = [row for row, question in enumerate(questions) for _ in question.continuations]
        continuations = [torch.tensor(ids) for question in questions for ids in question.continuations]
        indices = [index for question in questions for index in question.indices]
        size = self.batch_size_per_gpu
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            found = self._log_likelihoods(inputs_BTE[rows[part]], mask_BT[rows[part]], continuations[part])
            yield from zip(indices[part], found, strict=True)

    def _log_likelihoods(
        self, inputs_BTE: Tensor, mask_BT: Tensor, continuations: Sequence[Tensor]
    ) -> list[LogLikelihood]:
        """Each continuation's log-likelihood after prompt and latents, and whether greedy decoding generates it."""
        ids_BA = pad_sequence(list(continuations), batch_first=True).to(self.device)
        lengths_B = torch.tensor([len(ids) for ids in continuations], device=self.device)
        valid_BA = torch.arange(ids_BA.shape[1], device=self.device) < lengths_B[:, None]
        read_BTE = torch.cat([inputs_BTE, self.student.embed(ids_BA[:, :-1])], dim=1)
        mask_BT = torch.cat([mask_BT, valid_BA[:, :-1]], dim=1)
        logs_BAV = self.student.logits(read_BTE, mask_BT, first=inputs_BTE.shape[1] - 1).float().log_softmax(dim=-1)
        logs_BA = logs_BAV.gather(2, ids_BA[..., None]).squeeze(-1).masked_fill(~valid_BA, 0.0)
        greedy_B = ((logs_BAV.argmax(dim=-1) == ids_BA) | ~valid_BA).all(dim=1)
        return list(zip(logs_BA.sum(dim=1).tolist(), greedy_B.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not supported; raises NoLikelihoodError."""
        del disable_tqdm
        raise NoLikelihoodError(
            f"task '{requests[0].task_name}' needs the likelihood of text without a prompt, which a latent student "
            "does not have; choose a task with questions"
        )


def _questions(requests: Sequence[Pair]) -> list[_Question]:
    """Groups requests by prompt."""
    order = sorted(range(len(requests)), key=lambda index: requests[index][1])
    questions: list[_Question] = []
    for prompt, group in groupby(order, key=lambda index: requests[index][1]):
        indices = list(group)
        questions.append(_Question(tuple(prompt), [requests[index][2] for index in indices], indices))
    return questions
