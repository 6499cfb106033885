"""Greedy answers for validation, and exact match with the reference after stripping whitespace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from data.collate import Collator
from data.records import Record
from student_trainer.model.latent import LatentStudent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


@torch.no_grad()
def answer(
    student: LatentStudent,
    collator: Collator,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    max_new_tokens: int,
    device: torch.device,
    *,
    latent: bool,
) -> list[str]:
    """Greedy answers to the records' prompts: after latents (`latent`), or after reasoning generated as text."""
    ids_BP, mask_BP = collator.prompts([record.prompt for record in records])
    tokens_BA = student.generate(ids_BP.to(device), mask_BP.to(device), max_new_tokens, latent=latent)
    return [_until_end(row, tokenizer) for row in tokens_BA.tolist()]


def _until_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def is_correct(text: str, record: Record, *, latent: bool) -> bool:
    """Whether the reference's words are all of the text (`latent`), or its last words (after generated reasoning)."""
    words, reference = text.split(), record.answer.split()
    return words == reference if latent else words[-len(reference) :] == reference


def mean_over_ranks(totals: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sums every entry over ranks and divides by the summed `count`."""
    names = sorted(totals)
    summed = torch.tensor([totals[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    values = dict(zip(names, summed.tolist(), strict=True))
    return {name: value / max(values["count"], 1.0) for name, value in values.items() if name != "count"}
