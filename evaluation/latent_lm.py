"""lm-eval interface of a student that reasons in latents: prompt, latents, continuation.

Every request first computes the latents of its prompt. Text is generated after the latents, and the log-likelihood of a
continuation is conditioned on them, so that all choices of a question are scored after the same latents. Text without a
prompt has no likelihood.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from evaluation.text_lm import TextLM
from kvcore.errors import KVDistillError
from kvcore.types import Tensor
from student_trainer.model.generation import Start, after_latents, left_padded
from student_trainer.model.latent import LatentReasoning, LatentStudent, Thought
from student_trainer.model.prompt_format import PromptFormat

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LogLikelihood = tuple[float, bool]
Pair = tuple[tuple[str, str], list[int], list[int]]


class NoLikelihoodError(KVDistillError):
    """A task needs the likelihood of text without a prompt, which a latent student does not have."""


@dataclass(frozen=True, slots=True)
class _Question:
    """One prompt, its continuations, and the indices of their requests."""

    prompt: tuple[int, ...]
    continuations: list[list[int]]
    indices: list[int]


class LatentLM(TextLM):
    """A latent student with lm-eval's model interface.

    Args:
        lm: the student's language model, on its device.
        reasoning: its latent reasoning module.
        tokenizer: its tokenizer.
        batch_size: prompts per batch.
        prompt_format: how a prompt is read.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        reasoning: LatentReasoning,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        prompt_format: PromptFormat,
    ) -> None:
        super().__init__(lm, tokenizer, batch_size, prompt_format)
        self.student = LatentStudent(lm, reasoning).eval()

    @property
    def max_length(self) -> int:
        """Maximum number of text tokens: the context length minus the latents."""
        return super().max_length - self.student.reasoning.latents

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenises prompt and continuation separately, as in training, since the latents come between them."""
        if self.prompt_format.format == "chat":
            return super()._encode_pair(context, continuation)
        return self.prompt_ids(context), self.tok_encode(continuation, add_special_tokens=False)

    def start(self, ids_BP: Tensor, mask_BP: Tensor) -> Start:
        """What the model reads before its answers: left-padded prompts and their latents."""
        return after_latents(self.student, ids_BP, mask_BP)

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
        prompts = [question.prompt[-self.max_length :] for question in questions]
        thought = self.student.think(self.student.read_prompt(*left_padded(prompts, self.device)))
        rows = [row for row, question in enumerate(questions) for _ in question.continuations]
        continuations = [torch.tensor(ids) for question in questions for ids in question.continuations]
        indices = [index for question in questions for index in question.indices]
        size = self.batch_size_per_gpu
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            found = self._log_likelihoods(thought.rows(rows[part]), continuations[part])
            yield from zip(indices[part], found, strict=True)

    def _log_likelihoods(self, thought: Thought, continuations: Sequence[Tensor]) -> list[LogLikelihood]:
        """Each continuation's log-likelihood after prompt and latents, and whether greedy decoding generates it."""
        ids_BA = pad_sequence(list(continuations), batch_first=True).to(self.device)
        lengths_B = torch.tensor([len(ids) for ids in continuations], device=self.device)
        valid_BA = torch.arange(ids_BA.shape[1], device=self.device) < lengths_B[:, None]
        reading = self.student.read_answer(thought, ids_BA, valid_BA)
        logs_BAV = self.student.logits(reading.hidden_BAE).float().log_softmax(dim=-1)
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
