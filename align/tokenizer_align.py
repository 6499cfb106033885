"""Pairs the tokens of two tokenizers by the bytes of the text that they have read.

`byte_ends` in this module: for each token, how many bytes of the UTF-8 text have been read after it; -1 if that is
unknown or the token stands for no text. A token with -1 is never paired.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from kvcore.errors import FieldError
from kvcore.tensors.offsets import fingerprint, read_text
from kvcore.types import Tensor

METHODS = ("boundary", "overlap")


def pair_ends_batch(teacher_ends_BM: Tensor, student_ends_BT: Tensor) -> Tensor:
    """For each student token, the last teacher token that ends at the same byte: both have read the same text.

    Args:
        teacher_ends_BM: ascending except for -1; -1 in empty slots.
        student_ends_BT: -1 in padding.

    Returns:
        int64 [B,T]: an index into M, or -1.
    """
    if teacher_ends_BM.shape[1] == 0:
        return torch.full_like(student_ends_BT, -1, dtype=torch.int64)
    slots_M = torch.arange(teacher_ends_BM.shape[1], device=teacher_ends_BM.device)
    # The bytes read up to each slot, and the last slot with a known end: carried over slots whose end is unknown.
    read_BM = teacher_ends_BM.long().cummax(dim=1).values
    last_known_BM = torch.where(teacher_ends_BM >= 0, slots_M, -1).cummax(dim=1).values
    wanted_BT = student_ends_BT.long().contiguous()
    at_BT = torch.searchsorted(read_BM.contiguous(), wanted_BT, right=True) - 1
    found_BT = last_known_BM.gather(1, at_BT.clamp(min=0))
    ends_BT = teacher_ends_BM.long().gather(1, found_BT.clamp(min=0))
    # -1 equals -1 only before the first known end, where `found_BT` is -1 too.
    return torch.where(ends_BT == wanted_BT, found_BT, -1)


def overlap_weights_batch(teacher_ends_BM: Tensor, student_ends_BT: Tensor) -> tuple[Tensor, Tensor]:
    """For each student token, the teacher tokens that share bytes with it, weighted by how many they share.

    A token's bytes start where the last token with a known end stopped, so the bytes of a token with an unknown end
    count for the next token with a known one.

    Args:
        teacher_ends_BM: every token of each text, ascending except for -1; -1 in empty slots.
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
    """First byte and end byte of every token, as int32; equal for a token without bytes."""
    if ends_BT.shape[1] == 0:
        return ends_BT.int(), ends_BT.int()
    read_BT = ends_BT.int().clamp(min=0).cummax(dim=1).values
    before_BT = torch.cat([torch.zeros_like(read_BT[:, :1]), read_BT[:, :-1]], dim=1)
    return before_BT, read_BT


@dataclass(frozen=True, slots=True)
class TokenAlignment:
    """`weights`: sparse fp32 [T_s,T_t]; rows sum to 1 where `mask_Ts` is True and are empty elsewhere."""

    weights: Tensor
    mask_Ts: Tensor


class TokenizerAligner:
    """Aligns the tokens of one text under two tokenizers.

    `boundary` pairs a student token with the last teacher token that ends at the same byte, since both causal states
    have then read the same text, and masks the other student tokens. `overlap` averages the teacher tokens that share
    bytes with it, weighted by how many: fewer tokens are masked, but the states have read more or less than the
    student's. Equal tokenizers give the identity, whatever the script.

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
        student_1T, teacher_1M = _byte_ends(self._student, text), _byte_ends(self._teacher, text)
        if self._same:
            weights_TM = torch.eye(student_1T.shape[1])
        elif self._method == "overlap":
            weights_TM = overlap_weights_batch(teacher_1M, student_1T)[0][0]
        else:
            index_T = pair_ends_batch(teacher_1M, student_1T)[0]
            weights_TM = (index_T[:, None] == torch.arange(teacher_1M.shape[1])).float()
        return TokenAlignment(weights_TM.to_sparse(), weights_TM.any(dim=1))


def _byte_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return torch.tensor([read_text(tokenizer, text, add_special_tokens=True)[1]], dtype=torch.int32)
