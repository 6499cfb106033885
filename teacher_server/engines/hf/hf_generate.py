"""Text generation with transformers: the model's `generate`, with results that do not depend on the batch."""

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

from kvcore.plan import SamplingParams
from kvcore.types import Tensor
from teacher_server.engines.base import (
    FinishReason,
    GeneratedText,
    SampleFailure,
    TokenizedSample,
    Wanted,
    draw_seed,
)

# Decoders return this for the bytes of an incomplete character.
INCOMPLETE = "\ufffd"
# A character has at most 4 tokens: its bytes in UTF-8.
_TOKENS_PER_CHARACTER = 4


class HFGenerator:
    """Generates with a causal language model. Prompts are left-padded; padding is masked and shifts no position.

    `can_generate`: whether the model has what it needs to generate.

    Args:
        model: with its head. Its `generation_config` is None if its checkpoint has no head or its class cannot
            generate; otherwise only its end tokens are used.
        tokenizer: the model's.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model = model
        # A copy, because the server uses the original in another thread and not all tokenizers are thread-safe.
        self._tokenizer = copy.deepcopy(tokenizer)
        self.can_generate = model.generation_config is not None
        self._ends = _end_tokens(model, tokenizer)
        model.generation_config = GenerationConfig()

    def generate(
        self, prompts: Sequence[TokenizedSample], sampling: SamplingParams, wanted: Wanted
    ) -> list[GeneratedText | SampleFailure]:
        """See `TeacherEngine.generate`."""
        if not self.can_generate:
            problem = (
                "this teacher cannot generate: its checkpoint has no language-model head, or its class no generate()"
            )
            return [SampleFailure(row, problem) for row in range(len(prompts))]
        prompt_ids = [list(tokens.prompt_ids) for tokens in prompts]
        longest = max(map(len, prompt_ids))
        ends = _Ends(self, sampling, longest, len(prompts), wanted)
        new_BT = self._generate(prompt_ids, longest, prompts, sampling, ends)
        outcomes: list[GeneratedText | SampleFailure] = []
        for row, ids in enumerate(prompt_ids):
            count, reason = ends.found.get(row, (new_BT.shape[1], "length"))
            text = self._text(ids, new_BT[row, :count].tolist(), sampling.stop, reason)
            outcomes.append(GeneratedText(text, reason, count))
        return outcomes

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode token ids without special tokens."""
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast("str", text)

    def ends_text(self, token_id: int) -> bool:
        """Whether this token ends the model's text."""
        return token_id in self._ends

    def _generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        longest: int,
        prompts: Sequence[TokenizedSample],
        sampling: SamplingParams,
        ends: _Ends,
    ) -> Tensor:
        """The new tokens [B,T]. A row continues after its end while other rows generate."""
        device = cast("torch.device", self._model.device)
        padded = [[*[0] * (longest - len(ids)), *ids] for ids in prompt_ids]
        masks = [[*[0] * (longest - len(ids)), *[1] * len(ids)] for ids in prompt_ids]
        settings = GenerationConfig(max_new_tokens=sampling.max_new_tokens, do_sample=False, use_cache=True)
        processors = LogitsProcessorList()
        if sampling.temperature:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1.0:
                processors.append(TopPLogitsWarper(sampling.top_p))
            processors.append(_SeededDraw([draw_seed(sampling, tokens) for tokens in prompts]))
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

    def _text(self, prompt: list[int], new: list[int], stops: Sequence[str], reason: FinishReason) -> str:
        """The generated text up to the first stop text. Decoded with the prompt, on which its first space depends."""
        before, whole = self.decode(prompt), self.decode([*prompt, *new])
        text = whole.removeprefix(before) if whole.startswith(before) else self.decode(new)
        found = [index for stop in stops if (index := text.find(stop)) >= 0]
        if found:
            return text[: min(found)]
        return text.rstrip(INCOMPLETE) if reason == "length" else text


class _Ends(StoppingCriteria):
    """Stops rows whose text has ended. `found`: by row, the number of new tokens and the finish reason."""

    def __init__(self, generator: HFGenerator, sampling: SamplingParams, start: int, rows: int, wanted: Wanted) -> None:
        self.found: dict[int, tuple[int, FinishReason]] = {}
        self._generator = generator
        self._start = start
        self._stops = sampling.stop
        longest = max(map(len, sampling.stop), default=0)
        # One token more than a stop text can have, because decoders treat the first token's space specially.
        self._tail = _TOKENS_PER_CHARACTER * longest + 1 if longest else 0
        self._rows = rows
        self._wanted = wanted

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> torch.BoolTensor:
        """Whether each row has ended, [B]."""
        del scores
        new_BT = input_ids[:, self._start :]
        count = new_BT.shape[1]
        tails = new_BT[:, -max(self._tail, 1) :].tolist()
        for row in range(self._rows):
            if row not in self.found and (not self._wanted(row) or self._has_ended(tails[row])):
                self.found[row] = count, "stop"
        ended_B = torch.tensor([row in self.found for row in range(self._rows)], device=input_ids.device)
        return cast("torch.BoolTensor", ended_B)

    def _has_ended(self, tail: list[int]) -> bool:
        if self._generator.ends_text(tail[-1]):
            return True
        if not self._stops:
            return False
        text = self._generator.decode(tail)
        return any(stop in text for stop in self._stops)


class _SeededDraw(LogitsProcessor):
    """Samples each row's token with the row's own generator on the CPU, and masks all other tokens."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B,V] with one finite entry per row."""
        del input_ids
        draws = [torch.rand((), generator=generator, dtype=torch.float64) for generator in self._generators]
        cumulative_BV = scores.double().softmax(dim=-1).cumsum(dim=-1)
        targets_B1 = torch.stack(draws).to(scores.device)[:, None] * cumulative_BV[:, -1:]
        # The first token whose cumulative probability exceeds the draw; it never has probability zero.
        chosen_B1 = torch.searchsorted(cumulative_BV, targets_B1, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B1, 0.0)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end the model's text: those of its generation settings, or its tokenizer's EOS."""
    settings = cast("GenerationConfig | None", model.generation_config)
    ends = cast("int | list[int] | None", settings.eos_token_id if settings is not None else None)
    if ends is None:
        ends = cast("int | None", tokenizer.eos_token_id)
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)
