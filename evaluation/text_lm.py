"""lm-eval interface of a causal language model, with kvdistill's text generation in place of transformers'.

Of the checkpoint's generation settings only the end tokens count, and rows that have ended leave their batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from kvcore.tensors.selectors.random import sample_seed
from kvcore.types import Tensor
from student_trainer.model.generation import (
    Answer,
    Sampled,
    Start,
    TextEnd,
    after_prompt,
    end_tokens,
    generate,
    greedy,
    left_padded,
)
from student_trainer.model.prompt_format import PromptFormat, user_message_ids

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# lm-eval's decorator hides the type of the class.
_HFLM: Any = HFLM


class TextLM(_HFLM):
    """A causal language model with lm-eval's model interface.

    Args:
        lm: the model, on its device.
        tokenizer: its tokenizer.
        batch_size: prompts per batch.
        prompt_format: how a prompt is read.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        prompt_format: PromptFormat,
    ) -> None:
        super().__init__(lm, tokenizer=tokenizer, batch_size=batch_size)
        self.prompt_format = prompt_format
        self._ends = end_tokens(lm, tokenizer)
        self._sampled = count()

    def start(self, ids_BP: Tensor, mask_BP: Tensor) -> Start:
        """What the model reads before its answers to left-padded prompts."""
        return after_prompt(ids_BP, mask_BP)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt."""
        if self.prompt_format.format == "chat":
            return user_message_ids(self.tokenizer, prompt, self.prompt_format.system_prompt, "--format")
        return self.tok_encode(prompt)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a prompt and its continuation, which a chat template separates."""
        if self.prompt_format.format == "chat":
            # In a chat, no space separates an answer from what is before it.
            return self.prompt_ids(context), self.tok_encode(continuation.lstrip(), add_special_tokens=False)
        return super()._encode_pair(context, continuation)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated texts, in order."""
        del disable_tqdm
        return [answer.text for answer in self.write(requests)]

    def write(self, requests: Sequence[Instance]) -> list[Answer]:
        """Generated texts, in order, and whether each one ended."""
        results: dict[int, Answer] = {}
        prompts = [self.prompt_ids(request.args[0]) for request in requests]
        for settings, indices in self._batches(requests, prompts):
            found = self._write(settings, [prompts[index] for index in indices])
            results |= zip(indices, found, strict=True)
        return [results[index] for index in range(len(requests))]

    def _batches(
        self, requests: Sequence[Instance], prompts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Batches of requests with equal settings, longest prompts first: the settings and the requests' indices."""
        groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
        for index, request in enumerate(requests):
            _, settings = cast("tuple[str, dict[str, Any]]", request.args)
            groups.setdefault(repr(settings), (settings, []))[1].append(index)
        size = self.batch_size_per_gpu
        for settings, indices in groups.values():
            indices.sort(key=lambda index: -len(prompts[index]))
            for start in range(0, len(indices), size):
                yield settings, indices[start : start + size]

    @torch.inference_mode()
    def _write(self, settings: dict[str, Any], prompts: Sequence[Sequence[int]]) -> list[Answer]:
        wanted = cast("dict[str, Any]", normalize_gen_kwargs(settings, self.max_gen_toks))
        room = self.max_length - wanted["max_gen_toks"]
        prompts = [ids[-room:] for ids in prompts]
        end = TextEnd(self.tokenizer, self._ends, wanted["until"])
        temperature = wanted["temperature"] if wanted["do_sample"] else 0.0
        choose = Sampled(temperature, wanted.get("top_p", 1.0), self._seeds(prompts)) if temperature else greedy
        rows = generate(self.model, self.start(*left_padded(prompts, self.device)), wanted["max_gen_toks"], end, choose)
        return [end.answer(row) for row in rows]

    def _seeds(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """A new seed for each sampled text, since a task may ask for several texts of the same prompt."""
        return [sample_seed(next(self._sampled), ids) for ids in prompts]
