"""Surveys the dataset: sample lengths, excluded samples with reasons, and estimated bytes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from extraction.config import ExtractConfig
from extraction.dataset import Items
from kvcore.errors import ConfigError
from kvcore.plan import KVPlan, SpanKind
from kvcore.tensors.codec import part_layout
from kvcore.tensors.plan_size import sample_bytes
from kvcore.types import TENSORS, TeacherInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOO_LONG = "longer than --max_length"
NO_SPAN = "no text in the span"
_PARTS: tuple[SpanKind, ...] = ("prompt", "reasoning", "answer")
_READ_AT_ONCE = 512
# Measured bytes in journal, shard headers and index, per sample, tensor and layer.
_SAMPLE_BYTES, _TENSOR_BYTES, _LAYER_BYTES = 300, 210, 44
# Measured bytes per sample and teacher of a .pt file, without tensors and texts.
_PT_BYTES = 600


@dataclass(frozen=True, slots=True)
class Survey:
    """Token counts of a dataset by the student's tokenizer, and its excluded rows. R: rows.

    `tokens_R3`: tokens of prompt, reasoning and answer. `left_out`: reasons by row. `text_bytes`: bytes of all texts.
    `digest`: digest of the content.
    """

    tokens_R3: NDArray[np.int32]
    left_out: dict[int, str]
    text_bytes: int
    digest: str

    @property
    def rows(self) -> int:
        """Number of samples in the dataset."""
        return len(self.tokens_R3)

    def lengths(self) -> NDArray[np.int64]:
        """Student tokens of each text, [R]."""
        return self.tokens_R3.sum(axis=1, dtype=np.int64)

    def kept(self) -> Iterator[int]:
        """The rows that are not excluded."""
        return (row for row in range(self.rows) if row not in self.left_out)

    def candidates(self, plan: KVPlan, row: int) -> int:
        """Student tokens of the span that the plan selects from."""
        span = plan.selection.span
        counts = self.tokens_R3[row]
        return int(counts.sum() if span == "all" else counts[_PARTS.index(span)])


def survey(items: Items, tokenizer: PreTrainedTokenizerBase, config: ExtractConfig) -> Survey:
    """Reads the dataset once.

    Raises:
        ConfigError: an id is duplicate, or all samples are excluded.
        FieldError: a row is not a valid record.
    """
    tokens_R3 = np.zeros((len(items), 3), np.int32)
    digest = hashlib.blake2b(digest_size=16)
    rows_of_ids: dict[str, int] = {}
    text_bytes = 0
    for start in range(0, len(items), _READ_AT_ONCE):
        records = [items[row].record for row in range(start, min(start + _READ_AT_ONCE, len(items)))]
        for row, record in enumerate(records, start=start):
            if record.id in rows_of_ids:
                raise ConfigError(f"row {row + 1}: '{record.id}' is already the id of row {rows_of_ids[record.id] + 1}")
            rows_of_ids[record.id] = row
            for text in (record.id, record.prompt, record.reasoning, record.answer):
                content = text.encode()
                digest.update(len(content).to_bytes(8, "little") + content)
                text_bytes += len(content)
        for column, part in enumerate(_PARTS):
            texts = [getattr(record, part) for record in records]
            tokens_R3[start : start + len(records), column] = _counts(tokenizer, texts, with_special=column == 0)
    left_out = _left_out(tokens_R3, config)
    if len(left_out) == len(items):
        raise ConfigError(f"all {len(items)} samples are left out; reason for the first: {left_out[0]}")
    return Survey(tokens_R3, left_out, text_bytes, digest.hexdigest())


def _counts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, with_special: bool) -> list[int]:
    encoded: Any = tokenizer(list(texts), add_special_tokens=with_special, verbose=False)
    return [len(ids) for ids in encoded["input_ids"]]


def _left_out(tokens_R3: NDArray[np.int32], config: ExtractConfig) -> dict[int, str]:
    # Training appends an end-of-sequence token to the answer.
    too_long = np.flatnonzero(tokens_R3.sum(axis=1) + 1 > config.max_length)
    reasons = dict.fromkeys(too_long.tolist(), f"{TOO_LONG} {config.max_length}")
    span = config.selection.span
    if span != "all":
        for row in np.flatnonzero(tokens_R3[:, _PARTS.index(span)] == 0).tolist():
            reasons.setdefault(row, f"{NO_SPAN} '{span}'")
    return reasons


def stored_bytes(slots: int, tokens: int, plan: KVPlan, info: TeacherInfo) -> int:
    """What one sample takes in a store.

    Args:
        slots: tokens that are kept.
        tokens: of the whole text, in the teacher's tokens.
        plan: how they are kept.
        info: the teacher.
    """
    parts = sum(len(part_layout(plan.codec, kind, info.kv_heads, slots, info.head_dim)) for kind in TENSORS)
    # Positions, token ids and byte ends are stored with the parts.
    overhead = 8 * tokens + _SAMPLE_BYTES + _TENSOR_BYTES * (parts + 3) + _LAYER_BYTES * len(plan.layers)
    return sample_bytes(plan, info.kv_heads, info.head_dim, slots) + overhead


def pt_bytes(slots: int, plan: KVPlan, info: TeacherInfo) -> int:
    """What one sample takes of one teacher in a .pt file, without its texts."""
    element = 4 if plan.codec.name == "raw" else 2
    return 2 * element * len(plan.layers) * info.kv_heads * slots * info.head_dim + 4 * slots + _PT_BYTES
