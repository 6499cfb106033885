"""A student that reasons in latents, as lm-eval sees a model: prompt > latents > continuation.

Every request is thought about first. A generated text follows the latents, and the log-likelihood of a continuation is
that of the continuation after them, so that each choice of a question is weighed after the same thought. Text alone,
without a prompt to think about, has no likelihood here.
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
    """A task asks for what a student that thinks in latents does not have."""


@dataclass(frozen=True, slots=True)
class _Question:
    """One prompt, its continuations, and where their requests stand."""

    prompt: tuple[int, ...]
    continuations: list[list[int]]
    places: list[int]


class LatentLM(_HFLM):
    """A latent student behind lm-eval's interface.

    Args:
        lm: the student's language model, on its device.
        reasoning: its latents.
        tokenizer: its tokenizer.
        batch_size: questions that are read at once.
    """

    def __init__(
        self, lm: PreTrainedModel, reasoning: LatentReasoning, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> None:
        super().__init__(lm, tokenizer=tokenizer, batch_size=batch_size)
        self.student = LatentStudent(lm, reasoning).eval()

    @property
    def max_length(self) -> int:
        """Tokens of text that the model can read beside its latents."""
        return super().max_length - self.student.reasoning.latents

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Prompt and continuation apart, as in training: the latents stand between them."""
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)

    @torch.no_grad()
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Prompt and continuation [B,P+A] for left-padded prompts [B,P]."""
        inputs_BTE, mask_BT = self.student.think(context, generation_kwargs.pop("attention_mask").bool())
        if not generation_kwargs.get("do_sample"):
            generation_kwargs = {"do_sample": False}
        written_BA = self.model.generate(
            inputs_embeds=inputs_BTE,
            attention_mask=mask_BT.long(),
            max_new_tokens=max_length - context.shape[1],
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, 0, len(context)),
            pad_token_id=self.tokenizer.pad_token_id,
            **generation_kwargs,
        )
        return torch.cat([context, written_BA], dim=1)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[LogLikelihood]:
        del disable_tqdm
        results: list[LogLikelihood | None] = [None] * len(requests)
        size = override_bs or self.batch_size_per_gpu
        questions = sorted(_questions(requests), key=lambda question: -len(question.prompt))
        for start in range(0, len(questions), size):
            for place, found in self._weigh(questions[start : start + size]):
                results[place] = found
        assert None not in results
        return results  # pyright: ignore[reportReturnType]

    def _weigh(self, questions: Sequence[_Question]) -> Iterator[tuple[int, LogLikelihood]]:
        """Thinks about each question once, then reads its continuations."""
        prompts = [torch.tensor(question.prompt[-self.max_length :]) for question in questions]
        ids_BP = pad_sequence(prompts, batch_first=True, padding_side="left").to(self.device)
        lengths_B = torch.tensor([len(prompt) for prompt in prompts])
        mask_BP = (torch.arange(ids_BP.shape[1]) >= ids_BP.shape[1] - lengths_B[:, None]).to(self.device)
        inputs_BTE, mask_BT = self.student.think(ids_BP, mask_BP)
        rows = [row for row, question in enumerate(questions) for _ in question.continuations]
        continuations = [torch.tensor(ids) for question in questions for ids in question.continuations]
        places = [place for question in questions for place in question.places]
        size = self.batch_size_per_gpu
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            found = self._read(inputs_BTE[rows[part]], mask_BT[rows[part]], continuations[part])
            yield from zip(places[part], found, strict=True)

    def _read(self, inputs_BTE: Tensor, mask_BT: Tensor, continuations: Sequence[Tensor]) -> list[LogLikelihood]:
        """Each continuation's log-likelihood after prompt and latents, and whether greedy decoding would write it."""
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
        """Refused.

        Raises:
            NoLikelihoodError: always.
        """
        del disable_tqdm
        raise NoLikelihoodError(
            f"task '{requests[0].task_name}' asks for the likelihood of text as it stands; a student that thinks in "
            "latents has none, as it continues prompts: choose a task that asks questions"
        )


def _questions(requests: Sequence[Pair]) -> list[_Question]:
    """Requests with the same prompt, together."""
    order = sorted(range(len(requests)), key=lambda place: requests[place][1])
    questions: list[_Question] = []
    for prompt, places in groupby(order, key=lambda place: requests[place][1]):
        listed = list(places)
        questions.append(_Question(tuple(prompt), [requests[place][2] for place in listed], listed))
    return questions
