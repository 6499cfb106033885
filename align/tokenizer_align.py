"""Which teacher token a student token is compared with when their tokenizers differ, by byte-exact offsets.

`byte_ends` everywhere: for each token, how many bytes of the text's UTF-8 have been read when it has been read; -1
where that can't be told or where the token stands for no text. Such a token is never paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from kvcore.errors import FieldError
from kvcore.tensors.offsets import fingerprint, read_text
from kvcore.types import Tensor

METHODS = ("boundary", "overlap")
Rows = list[list[tuple[int, float]]]


def pair_ends(teacher_ends: Sequence[int], student_ends: Sequence[int]) -> list[int]:
    """For each student token the last teacher token that ends at the same byte, or -1: both have read the same text."""
    last_at = {end: t for t, end in enumerate(teacher_ends) if end >= 0}
    return [last_at.get(end, -1) for end in student_ends]


def pair_ends_batch(teacher_ends_BM: Tensor, student_ends_BT: Tensor) -> Tensor:
    """`pair_ends` for a padded batch, in one go.

    Args:
        teacher_ends_BM: ascending where not -1; -1 in empty slots.
        student_ends_BT: -1 in padding.

    Returns:
        int64 [B,T]: an index into M, or -1.
    """
    if teacher_ends_BM.shape[1] == 0:
        return torch.full_like(student_ends_BT, -1, dtype=torch.int64)
    slots_M = torch.arange(teacher_ends_BM.shape[1], device=teacher_ends_BM.device)
    # What has been read by a slot, and which slot last told: both carried over slots that tell nothing.
    read_BM = teacher_ends_BM.long().cummax(dim=1).values
    teller_BM = torch.where(teacher_ends_BM >= 0, slots_M, -1).cummax(dim=1).values
    wanted_BT = student_ends_BT.long().contiguous()
    at_BT = torch.searchsorted(read_BM.contiguous(), wanted_BT, right=True) - 1
    found_BT = teller_BM.gather(1, at_BT.clamp(min=0))
    ends_BT = teacher_ends_BM.long().gather(1, found_BT.clamp(min=0))
    # An end of -1 can only meet another before any slot has told, where nothing is found.
    return torch.where(ends_BT == wanted_BT, found_BT, -1)


def overlap_rows(teacher_ends: Sequence[int], student_ends: Sequence[int]) -> Rows:
    """For each student token the teacher tokens whose bytes it shares, weighted by how many.

    Each row sums to 1 or is empty. A token's bytes start where the last token with a known end stopped, so the bytes of
    a token whose end can't be told count for the next one that can.
    """
    teacher = _byte_ranges(teacher_ends)
    rows: Rows = []
    first = 0
    for s_index, start, end in _byte_ranges(student_ends):
        rows.extend([] for _ in range(s_index - len(rows)))
        while first < len(teacher) and teacher[first][2] <= start:
            first += 1
        shared: list[tuple[int, int]] = []
        for t_index, t_start, t_end in teacher[first:]:
            if t_start >= end:
                break
            shared.append((t_index, min(end, t_end) - max(start, t_start)))
        total = sum(count for _, count in shared)
        rows.append([(t_index, count / total) for t_index, count in shared])
    rows.extend([] for _ in range(len(student_ends) - len(rows)))
    return rows


def overlap_weights_batch(teacher_ends_BM: Tensor, student_ends_BT: Tensor) -> tuple[Tensor, Tensor]:
    """`overlap_rows` for a padded batch of whole texts, in one go.

    Args:
        teacher_ends_BM: every token of each text, ascending where not -1; -1 in empty slots.
        student_ends_BT: likewise.

    Returns:
        fp32 [B,T,M] and a mask [B,T]: rows sum to 1 where it is True and are zero elsewhere.
    """
    t_start_BM, t_end_BM = _byte_ranges_batch(teacher_ends_BM)
    s_start_BT, s_end_BT = _byte_ranges_batch(student_ends_BT)
    end_BTM = torch.minimum(s_end_BT[:, :, None], t_end_BM[:, None, :])
    shared_BTM = (end_BTM - torch.maximum(s_start_BT[:, :, None], t_start_BM[:, None, :])).clamp(min=0)
    total_BT = shared_BTM.sum(dim=2)
    return shared_BTM.float() / total_BT.clamp(min=1)[:, :, None].float(), total_BT > 0


def _byte_ranges_batch(ends_BT: Tensor) -> tuple[Tensor, Tensor]:
    """First byte, and byte after the last, of every token, as int32: the same where it stands for no byte."""
    if ends_BT.shape[1] == 0:
        return ends_BT.int(), ends_BT.int()
    read_BT = ends_BT.int().clamp(min=0).cummax(dim=1).values
    before_BT = torch.cat([torch.zeros_like(read_BT[:, :1]), read_BT[:, :-1]], dim=1)
    return before_BT, read_BT


def _byte_ranges(ends: Sequence[int]) -> list[tuple[int, int, int]]:
    """(token, first byte, byte after the last) of every token that stands for at least one byte."""
    ranges: list[tuple[int, int, int]] = []
    read = 0
    for index, end in enumerate(ends):
        if end > read:
            ranges.append((index, read, end))
            read = end
    return ranges


@dataclass(frozen=True, slots=True)
class TokenAlignment:
    """`weights`: sparse fp32 [T_s,T_t], rows summing to 1 where `mask_Ts` is True and empty elsewhere."""

    weights: Tensor
    mask_Ts: Tensor


class TokenizerAligner:
    """Aligns the tokens of one text under two tokenizers.

    `boundary` pairs a student token with the last teacher token that ends at the same byte, since both causal states
    have then read the same text, and masks the rest. `overlap` averages the teacher tokens that share bytes with it,
    weighted by how many: more rows, but states that have read more or less than the student's. Equal tokenizers give
    the identity, whatever the script.

    Args:
        teacher_tokenizer: a fast transformers tokenizer.
        student_tokenizer: another, or the same.
        method: `boundary` or `overlap`.

    Raises:
        FieldError: unknown method.
    """

    def __init__(
        self,
        teacher_tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
        method: str = "boundary",
    ) -> None:
        if method not in METHODS:
            raise FieldError("method", f"expected one of {', '.join(METHODS)}; got '{method}'")
        self._teacher = teacher_tokenizer
        self._student = student_tokenizer
        self._method = method
        self._same = fingerprint(teacher_tokenizer) == fingerprint(student_tokenizer)

    def align(self, text: str) -> TokenAlignment:
        """Aligns the student's tokens of `text` (rows) with the teacher's (columns), special tokens included."""
        _, student_ends = read_text(self._student, text, add_special_tokens=True)
        if self._same:
            rows: Rows = [[(t, 1.0)] for t in range(len(student_ends))]
            return _alignment(rows, len(student_ends))
        _, teacher_ends = read_text(self._teacher, text, add_special_tokens=True)
        if self._method == "overlap":
            rows = overlap_rows(teacher_ends, student_ends)
        else:
            rows = [[(t, 1.0)] if t >= 0 else [] for t in pair_ends(teacher_ends, student_ends)]
        return _alignment(rows, len(teacher_ends))


def _alignment(rows: Rows, columns: int) -> TokenAlignment:
    entries = [(s, t, weight) for s, row in enumerate(rows) for t, weight in row]
    indices = torch.tensor([[s for s, _, _ in entries], [t for _, t, _ in entries]], dtype=torch.int64).view(2, -1)
    values = torch.tensor([weight for _, _, weight in entries])
    weights = torch.sparse_coo_tensor(indices, values, (len(rows), columns), check_invariants=True).coalesce()
    return TokenAlignment(weights, torch.tensor([bool(row) for row in rows], dtype=torch.bool))
