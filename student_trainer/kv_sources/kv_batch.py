"""One teacher's answers for a micro-batch, as padded tensors with a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvcore.errors import TeacherRefusedError
from kvcore.plan import KVPlan
from kvcore.tensors.codec import decode_batch
from kvcore.types import BatchKV, EncodedSampleKV, MissingKV, TeacherInfo, Tensor
from student_trainer.kv_sources.base import KVResult


@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """A decoded batch and what it took to get it. Sums are over the samples that came."""

    kv: BatchKV
    samples: int
    missing: int
    encoded_bytes: int
    raw_bf16_bytes: int
    teacher_tokens: int
    seconds: Mapping[str, float]


def decode_and_pad(
    teacher: str, results: Sequence[KVResult], info: TeacherInfo, plan: KVPlan, slots: int | None, on_missing: str
) -> DecodedBatch:
    """Decodes a teacher's answers, padded to `slots` (or to the longest).

    Raises:
        TeacherRefusedError: a sample is missing and `on_missing` is `fail`.
    """
    rows = [index for index, result in enumerate(results) if isinstance(result, EncodedSampleKV)]
    missing = [result for result in results if isinstance(result, MissingKV)]
    if missing and on_missing == "fail":
        raise TeacherRefusedError(
            teacher,
            f"no K/V for {len(missing)} of {len(results)} samples, the first of them '{missing[0].sample_id}': "
            f"{missing[0].reason}. Set kv.on_missing=mask to go on without them",
        )
    present = [result for result in results if isinstance(result, EncodedSampleKV)]
    tokens = sum(int(result.token_ids_T.numel()) for result in present)
    kv = _spread(decode_batch(present), rows, len(results)) if present else _nothing(len(results), info, plan)
    seconds = {
        stage: sum(getattr(result.timings, stage) for result in present)
        for stage in ("queue", "prefill", "encode", "network")
    }
    full_token_bytes = info.layers * info.kv_heads * info.head_dim * 2 * 2
    return DecodedBatch(
        _pad_slots(kv, slots),
        len(present),
        len(missing),
        sum(result.nbytes for result in present),
        tokens * full_token_bytes,
        tokens,
        seconds,
    )


def _spread(kv: BatchKV, rows: list[int], batch: int) -> BatchKV:
    """Puts the samples that came back into their rows; the others are masked out."""
    if len(rows) == batch:
        return kv

    def place(tensor: Tensor, fill: int) -> Tensor:
        placed = tensor.new_full((batch, *tensor.shape[1:]), fill)
        placed[rows] = tensor
        return placed

    placed = kv.map(lambda x_BLHMD: place(x_BLHMD, 0))
    return replace(placed, mask_BM=place(kv.mask_BM, 0), byte_ends_BLHM=place(kv.byte_ends_BLHM, -1))


def _nothing(batch: int, info: TeacherInfo, plan: KVPlan) -> BatchKV:
    """A batch in which every sample is masked out: ranks go through the same steps whatever a teacher did."""
    shape = (batch, len(plan.layers), info.kv_heads, 1, info.head_dim)
    return BatchKV(
        torch.zeros(shape),
        torch.zeros(shape),
        torch.zeros(batch, 1, dtype=torch.bool),
        torch.full((batch, 1, 1, 1), -1, dtype=torch.long),
    )


def _pad_slots(kv: BatchKV, slots: int | None) -> BatchKV:
    width = kv.mask_BM.shape[1]
    if slots is None or width == slots:
        return kv
    assert width < slots, "a plan's budget bounds the slots"
    extra = slots - width
    pad = torch.nn.functional.pad
    return replace(
        kv.map(lambda x_BLHMD: pad(x_BLHMD, (0, 0, 0, extra))),
        mask_BM=pad(kv.mask_BM, (0, extra)),
        byte_ends_BLHM=pad(kv.byte_ends_BLHM, (0, extra), value=-1),
    )
