"""A selector, a codec, a loss and a dataset for kvdistill. pyproject.toml names them as entry points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvdistill import Selection
from kvdistill.plugins import Candidates, Codec, Family, Question, RowDroppedError, TokenSelector, per_slot


def _both_ends(candidates: Candidates, _selection: Selection, slots: int) -> torch.Tensor:
    """The first and the last tokens; the last ones get the odd slot."""
    first = slots // 2
    count = candidates.count
    return candidates.same_places([*range(first), *range(count - (slots - first), count)])


BOTH_ENDS = TokenSelector(_both_ends)

FP16 = Codec(
    encode=lambda x_BHMD, _kind, _group_size: {"data": x_BHMD.half().contiguous()},
    decode=lambda parts, _kind, _group_size: parts["data"].float(),
    layout=lambda shape_HMD, _kind, _group_size: [("data", torch.float16, shape_HMD)],
)


@per_slot
def absolute(student_BLHMD: torch.Tensor, target_BLHMD: torch.Tensor) -> torch.Tensor:
    """The mean absolute difference of a slot's elements."""
    return (student_BLHMD - target_BLHMD).abs().mean(dim=-1)


def _sum_of(row: Mapping[str, Any]) -> Question:
    terms = row["terms"]
    if len(terms) < 2:
        raise RowDroppedError("fewer than two terms")
    text = " + ".join(map(str, terms))
    return Question(stem=f"What is {text}?", reasoning=f"{text} = {sum(terms)}", answer=str(sum(terms)))


SUMS = Family(name="sums", hub=None, columns=("terms",), parse=_sum_of, task_type="arithmetic")
