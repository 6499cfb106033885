"""A transformers model that writes: its own `generate`, with draws and ends that do not depend on the batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from kvcore.types import Tensor
from teacher_server.engines.base import (
    FinishReason,
    GeneratedText,
    GenerateOptions,
    SampleFailure,
    TokenizedSample,
    Wanted,
)

# What a decoder makes of bytes that are no character yet.
INCOMPLETE = "\ufffd"
# A character is at most this many tokens: its bytes in UTF-8.
_TOKENS_PER_CHARACTER = 4


class HFGenerator:
    """Writes with a causal language model. Left padding is masked, and shifts no position.

    Args:
        model: with its head; it has no generation settings where its checkpoint has no head, or its class cannot
            generate. Its settings are replaced: none but its end tokens applies.
        tokenizer: the model's.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model = model
        # A copy: the other one reads texts in a thread of its own, and not all of them stand two callers at once.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._can_write = model.generation_config is not None
        self._ends = _end_tokens(model, tokenizer)
        model.generation_config = GenerationConfig()

    def write(
        self, prompts: Sequence[TokenizedSample], options: GenerateOptions, wanted: Wanted
    ) -> list[GeneratedText | SampleFailure]:
        """See `TeacherEngine.generate`."""
        if not self._can_write:
            problem = "this teacher cannot write: its checkpoint has no language-model head, or its class no generate()"
            return [SampleFailure(row, problem) for row in range(len(prompts))]
        prompt_ids = [list(tokens.prompt_ids) for tokens in prompts]
        longest = max(map(len, prompt_ids))
        ends = _Ends(self, options, longest, len(prompts), wanted)
        written_BT = self._generate(prompt_ids, longest, prompts, options, ends)
        outcomes: list[GeneratedText | SampleFailure] = []
        for row, ids in enumerate(prompt_ids):
            count, reason = ends.found.get(row, (written_BT.shape[1], "length"))
            text = self._text(ids, written_BT[row, :count].tolist(), options.stop, reason)
            outcomes.append(GeneratedText(text, reason, count))
        return outcomes

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast("str", text)

    def ends_text(self, token_id: int) -> bool:
        """Whether the model ends its text with this token."""
        return token_id in self._ends

    def _generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        longest: int,
        prompts: Sequence[TokenizedSample],
        options: GenerateOptions,
        ends: _Ends,
    ) -> Tensor:
        """The tokens written, [B,T]; a row goes on behind its end while others write."""
        device = cast("torch.device", self._model.device)
        padded = [[*[0] * (longest - len(ids)), *ids] for ids in prompt_ids]
        masks = [[*[0] * (longest - len(ids)), *[1] * len(ids)] for ids in prompt_ids]
        settings = GenerationConfig(max_new_tokens=options.max_new_tokens, do_sample=False, use_cache=True)
        processors = LogitsProcessorList()
        if options.temperature:
            processors.append(TemperatureLogitsWarper(options.temperature))
            if options.top_p < 1.0:
                processors.append(TopPLogitsWarper(options.top_p))
            processors.append(_SeededDraw([options.seed_for(tokens) for tokens in prompts]))
        generate = cast("Any", self._model).generate
        with torch.inference_mode():
            tokens_BT = generate(
                torch.tensor(padded, device=device),
                attention_mask=torch.tensor(masks, device=device),
                generation_config=settings,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([ends]),
            )
        return cast("Tensor", tokens_BT[:, longest:]).cpu()

    def _text(self, prompt: list[int], written: list[int], stops: Sequence[str], reason: FinishReason) -> str:
        """What was written, up to the first stop text. Decoded behind the prompt, on which its first space depends."""
        before, whole = self.decode(prompt), self.decode([*prompt, *written])
        text = whole.removeprefix(before) if whole.startswith(before) else self.decode(written)
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        if places:
            return text[: min(places)]
        return text.rstrip(INCOMPLETE) if reason == "length" else text


class _Ends(StoppingCriteria):
    """Notes where each row's text ends: `found` has its tokens and why."""

    def __init__(self, writer: HFGenerator, options: GenerateOptions, prompt: int, rows: int, wanted: Wanted) -> None:
        self.found: dict[int, tuple[int, FinishReason]] = {}
        self._writer = writer
        self._prompt = prompt
        self._stops = options.stop
        longest = max(map(len, options.stop), default=0)
        # One token more than a stop text can have: decoders treat the first one's space in their own way.
        self._tail = _TOKENS_PER_CHARACTER * longest + 1 if longest else 0
        self._rows = rows
        self._wanted = wanted

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> torch.BoolTensor:
        """Which rows have ended, [B]."""
        del scores
        written_BT = input_ids[:, self._prompt :]
        count = written_BT.shape[1]
        tails = written_BT[:, -max(self._tail, 1) :].tolist()
        for row in range(self._rows):
            if row not in self.found and (not self._wanted(row) or self._has_ended(tails[row])):
                self.found[row] = count, "stop"
        ended_B = torch.tensor([row in self.found for row in range(self._rows)], device=input_ids.device)
        return cast("torch.BoolTensor", ended_B)

    def _has_ended(self, tail: list[int]) -> bool:
        if self._writer.ends_text(tail[-1]):
            return True
        if not self._stops:
            return False
        text = self._writer.decode(tail)
        return any(stop in text for stop in self._stops)


class _SeededDraw(LogitsProcessor):
    """Draws each row's token with a generator of its own, on the host, and leaves nothing else to choose from."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B,V] scores with one finite entry each."""
        del input_ids
        draws = [torch.rand((), generator=generator, dtype=torch.float64) for generator in self._generators]
        reached_BV = scores.double().softmax(dim=-1).cumsum(dim=-1)
        aims_B1 = torch.stack(draws).to(scores.device)[:, None] * reached_BV[:, -1:]
        # The first token whose cumulative probability passes the aim: never one of probability zero.
        chosen_B1 = torch.searchsorted(reached_BV, aims_B1, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B1, 0.0)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end the model's text: those of its generation settings, else its tokenizer's EOS."""
    settings = cast("GenerationConfig | None", model.generation_config)
    ends = cast("int | list[int] | None", settings.eos_token_id if settings is not None else None)
    if ends is None:
        ends = cast("int | None", tokenizer.eos_token_id)
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)
