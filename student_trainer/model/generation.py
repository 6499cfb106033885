"""Text generation with a student, or with any causal language model of transformers.

The same loop answers in validation, in `kvdistill eval` and in the Python API. Of a checkpoint's generation settings
only the end tokens count: a repetition penalty or a sampling temperature would change what is measured.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from kvcore.errors import UnsupportedModelError
from kvcore.types import Tensor
from student_trainer.model.latent import LatentStudent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The next token of each row, from its logits and its number in the batch.
Choose = Callable[[Tensor, Sequence[int]], Tensor]
# A byte-level token holds at least one byte of a character, and a character has at most four.
_TOKENS_PER_CHARACTER = 4


@dataclass(frozen=True, slots=True)
class Start:
    """What a model reads before its first new token: `input_ids` [B,T] or `inputs_embeds` [B,T,E], left-padded.

    `mask_BT`: of what `cache` holds, then the inputs. `forward_passes`: how often the model ran to fill the cache.
    """

    inputs: dict[str, Tensor]
    mask_BT: Tensor
    cache: Any = None
    forward_passes: int = 0


@dataclass(slots=True)
class Row:
    """The new tokens of one prompt, without the end token.

    `ended`: by an end token or a stop text. `forward_passes`: of the model, one for each token after the start.
    """

    ids: list[int] = field(default_factory=list)
    ended: bool = False
    forward_passes: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated text.

    `finished`: it ended by itself; otherwise it was cut off at the maximum number of tokens. `forward_passes`: how
    often the model ran, over prompt and latents and for each token.
    """

    text: str
    finished: bool
    forward_passes: int


class TextEnd:
    """Where a generated text ends.

    Args:
        tokenizer: decodes the new tokens.
        tokens: the end tokens.
        stop: texts that end the generation. They are no part of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int], stop: Sequence[str] = ()) -> None:
        self.tokens = frozenset(tokens)
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        # One token more than a stop text can have, because decoders treat the first token's space specially.
        self._tail = _TOKENS_PER_CHARACTER * max(map(len, self._stop), default=0) + 1

    def has_stop_text(self, ids: Sequence[int]) -> bool:
        """Whether the last tokens contain a stop text."""
        if not self._stop:
            return False
        text = self._decode(ids[-self._tail :])
        return any(stop in text for stop in self._stop)

    def answer(self, row: Row) -> Answer:
        """The text of a row's tokens, up to the first stop text."""
        text = self._decode(row.ids)
        cut = min((text.find(stop) for stop in self._stop if stop in text), default=len(text))
        return Answer(text[:cut], row.ended, row.forward_passes)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class Sampled:
    """Draws tokens. A row's text depends on its seed and its prompt, not on the rest of the batch.

    Args:
        temperature: of the softmax, above 0.
        top_p: tokens are drawn from the smallest set whose probabilities reach this sum.
        seeds: one of each row, signed 64 bits.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Iterable[int]) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._generators = [torch.Generator().manual_seed(seed & (2**63 - 1)) for seed in seeds]

    def __call__(self, logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """The next token [B] of each row."""
        draws = [torch.rand((), generator=self._generators[row], dtype=torch.float64) for row in rows]
        sorted_BV, order_BV = (
            (logits_BV.double() / self._temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        )
        cumulative_BV = sorted_BV.cumsum(dim=-1)
        last_B1 = (cumulative_BV < self._top_p).sum(dim=-1, keepdim=True).clamp(max=logits_BV.shape[-1] - 1)
        targets_B1 = torch.stack(draws).to(logits_BV.device)[:, None] * cumulative_BV.gather(1, last_B1)
        # The first token whose cumulative probability exceeds the draw; it never has probability zero.
        place_B1 = torch.searchsorted(cumulative_BV, targets_B1, right=True).minimum(last_B1)
        return order_BV.gather(1, place_B1).squeeze(1)


def greedy(logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
    """The most likely token [B] of each row."""
    del rows
    return logits_BV.argmax(dim=-1)


def end_tokens(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a model's text: those of its generation settings, and its tokenizer's."""
    listed = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    tokens = {listed} if isinstance(listed, int) else set(cast("Iterable[int]", listed or ()))
    own = cast("int | None", tokenizer.eos_token_id)
    return tokens if own is None else tokens | {own}


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B,P] of prompts."""
    rows = [torch.tensor(ids) for ids in prompts]
    ids_BP = pad_sequence(rows, batch_first=True, padding_side="left")
    mask_BP = pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True, padding_side="left").bool()
    return ids_BP.to(device), mask_BP.to(device)


def after_prompt(ids_BP: Tensor, mask_BP: Tensor) -> Start:
    """Generation straight after left-padded prompts."""
    return Start({"input_ids": ids_BP}, mask_BP)


@torch.no_grad()
def after_latents(student: LatentStudent, ids_BP: Tensor, mask_BP: Tensor) -> Start:
    """Generation after left-padded prompts and the latents that the student computes for them."""
    thought = student.think(student.read_prompt(ids_BP, mask_BP))
    inputs = {"inputs_embeds": thought.latents_BME}
    return Start(inputs, thought.mask(), thought.prompt.kept.growing(), 1 + student.reasoning.passes)


def shortened(student: LatentStudent, latents: int | None, passes: int | None) -> LatentStudent:
    """The same student, which shares all weights, with its first `latents` only, or another number of passes.

    Attention is causal, so the first latents do not depend on those left out.
    """
    reasoning = copy.copy(student.reasoning)
    reasoning.latents = latents or reasoning.latents
    reasoning.passes = passes or reasoning.passes
    return LatentStudent(student.lm, reasoning).eval()


def generate(
    lm: PreTrainedModel,
    start: Start,
    max_new_tokens: int,
    end: TextEnd,
    choose: Choose = greedy,
    *,
    together: bool = False,
) -> list[Row]:
    """The new tokens of each row, as `steps` generates them."""
    rows: list[Row] = []
    for rows in steps(lm, start, max_new_tokens, end, choose, together=together):  # noqa: B007 - the last ones
        pass
    return rows


@torch.no_grad()
def steps(
    lm: PreTrainedModel,
    start: Start,
    max_new_tokens: int,
    end: TextEnd,
    choose: Choose = greedy,
    *,
    together: bool = False,
) -> Iterator[list[Row]]:
    """Generates one token per row and step, until all rows have ended or `max_new_tokens` steps are done.

    Rows that have ended leave the batch, so that a long answer does not delay the others.

    Args:
        lm: the model, in evaluation mode.
        start: what it reads first.
        max_new_tokens: the limit, at least 1.
        end: where texts end.
        choose: chooses tokens.
        together: the ranks share the model's parameters, so they run the same number of passes. All ranks must call it.

    Yields:
        all rows, the same objects after every step.

    Raises:
        UnsupportedModelError: the model has no cache of keys and values.
    """
    rows = [Row(forward_passes=start.forward_passes) for _ in range(len(start.mask_BT))]
    batch = list(range(len(rows)))
    inputs, mask_BT, cache = start.inputs, start.mask_BT, start.cache
    known = _arguments(lm)
    for _ in range(max_new_tokens):
        logits_BV, cache = _next_logits(lm, known, inputs, mask_BT, cache)
        next_B = choose(logits_BV, batch)
        for number, token in zip(batch, next_B.tolist(), strict=True):
            _add(rows[number], token, end)
        yield rows
        still = [place for place, number in enumerate(batch) if not rows[number].ended]
        if not _any_open(len(still), mask_BT.device, together=together):
            return
        kept = still or [0]  # A rank that waits for the others keeps a row.
        # Only when the batch halves, because selecting rows copies the cache.
        if 2 * len(kept) <= len(batch):
            index_B = torch.tensor(kept, device=mask_BT.device)
            cache.reorder_cache(index_B)
            batch, mask_BT, next_B = [batch[place] for place in kept], mask_BT[index_B], next_B[index_B]
        inputs = {"input_ids": next_B[:, None]}
        mask_BT = functional.pad(mask_BT, (0, 1), value=True)


def _arguments(lm: PreTrainedModel) -> frozenset[str]:
    """The names of the arguments that the model's forward pass takes."""
    known = frozenset(inspect.signature(lm.forward).parameters)
    if "past_key_values" not in known:
        raise UnsupportedModelError(
            f"{type(lm).__name__} has no cache of keys and values, so kvdistill cannot generate text with it"
        )
    return known


def _next_logits(
    lm: PreTrainedModel, known: frozenset[str], inputs: dict[str, Tensor], mask_BT: Tensor, cache: Any
) -> tuple[Tensor, Any]:
    """The logits [B,V] after the inputs, and the cache with them. `known`: the arguments of the forward pass."""
    (given,) = inputs.values()
    positions_BT = (mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)[:, -given.shape[1] :]
    settings = {"position_ids": positions_BT, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    # Some architectures have no positions, or always compute all logits.
    settings = {name: value for name, value in settings.items() if name in known}
    output: Any = lm(**inputs, attention_mask=mask_BT.long(), **settings)
    return output.logits[:, -1], output.past_key_values


def _add(row: Row, token: int, end: TextEnd) -> None:
    if row.ended:
        return
    row.forward_passes += 1
    if token in end.tokens:
        row.ended = True
        return
    row.ids.append(token)
    row.ended = end.has_stop_text(row.ids)


def _any_open(count: int, device: torch.device, *, together: bool) -> bool:
    """Whether a row has not ended: one of this rank, or of any rank if they run `together`."""
    if not together:
        return count > 0
    open_rows = torch.tensor(count, device=device)
    dist.all_reduce(open_rows, op=dist.ReduceOp.MAX)
    return bool(open_rows)
