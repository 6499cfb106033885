"""Greedy answers for validation, and exact match with the reference after stripping whitespace."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from data.collate import Collator
from data.records import Record
from student_trainer.model.generation import Answer, TextEnd, after_latents, after_prompt, generate
from student_trainer.model.latent import LatentStudent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
# A student that ends nearly all its answers needs no warning.
_WARN_UNFINISHED = 0.1


def rank_batches(count: int, micro_batch: int, rank: int, world_size: int) -> list[tuple[list[int], int]]:
    """This rank's batches of indices, and how many indices of each batch count.

    Every rank gets the same number of full batches, as ranks that share parameters must run the same passes. Batches
    are filled up with the first record, which then does not count.
    """
    share = list(range(rank, count, world_size))
    batches = math.ceil(math.ceil(count / world_size) / micro_batch)
    padded = share + [0] * (batches * micro_batch - len(share))
    return [
        (padded[start : start + micro_batch], max(0, min(micro_batch, len(share) - start)))
        for start in range(0, len(padded), micro_batch)
    ]


def answer(
    student: LatentStudent,
    collator: Collator,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    max_new_tokens: int,
    device: torch.device,
    *,
    latent: bool,
    together: bool = False,
) -> list[Answer]:
    """Greedy answers to the records' prompts: after latents (`latent`), or after reasoning generated as text.

    `together`: the ranks share the student's parameters; all of them must call this.
    """
    ids_BP, mask_BP = (tensor.to(device) for tensor in collator.record_prompts(records))
    start = after_latents(student, ids_BP, mask_BP) if latent else after_prompt(ids_BP, mask_BP)
    assert isinstance(tokenizer.eos_token_id, int), "the collator refuses a tokenizer without an end token"
    # The end that training teaches; the checkpoint's generation settings may list others.
    end = TextEnd(tokenizer, [tokenizer.eos_token_id])
    rows = generate(student.lm, start, max_new_tokens, end, together=together)
    return [end.answer(row) for row in rows]


def is_correct(text: str, record: Record, *, latent: bool) -> bool:
    """Whether the reference's words are all of the text (`latent`), or its last words (after generated reasoning)."""
    words, reference = text.split(), record.answer.split()
    return words == reference if latent else words[-len(reference) :] == reference


def warn_of_unfinished(share: float, max_new_tokens: int) -> None:
    """Logs a warning on rank 0 if many answers were cut off, because they count as wrong."""
    if share >= _WARN_UNFINISHED and dist.get_rank() == 0:
        logger.warning(
            "%.0f %% of the validation answers did not end within %d tokens and were cut off; raise "
            "data.answer_tokens. Early in training, the student may not have learnt yet where answers end",
            100 * share,
            max_new_tokens,
        )


def mean_over_ranks(totals: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sums every entry over ranks and divides by the summed `count`."""
    names = sorted(totals)
    summed = torch.tensor([totals[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    values = dict(zip(names, summed.tolist(), strict=True))
    return {name: value / max(values["count"], 1.0) for name, value in values.items() if name != "count"}
