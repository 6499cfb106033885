"""Decodes one teacher's results for a micro-batch into padded tensors with a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from kvcore.errors import ProtocolError, TeacherRefusedError
from kvcore.plan import KVPlan
from kvcore.tensors.codec import decode_batch
from kvcore.types import BatchKV, EncodedSampleKV, MissingKV, TeacherInfo, Tensor, Timings
from student_trainer.kv_sources.base import KVResult

# Stages at the teacher and in the network; then what the trainer does with the results.
TEACHER_STAGES = ("queue", "prefill", "encode", "network")
STAGES = (*TEACHER_STAGES, "decode", "stall")


@dataclass(frozen=True, slots=True)
class TeacherSums:
    """Sums over what one teacher sent.

    `samples`, `missing`: samples with and without K/V. `encoded_bytes`: of encoded K/V. `seconds`: by stage; a batch of
    the teacher counts once in a micro-batch, whatever the number of its samples.
    `raw_bytes`: what all of the teacher's K/V would take in bf16. `tokens`: the teacher's tokens.
    """

    samples: float = 0.0
    missing: float = 0.0
    encoded_bytes: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    raw_bytes: float = 0.0
    tokens: float = 0.0

    def __add__(self, other: TeacherSums) -> TeacherSums:
        return TeacherSums.from_row([a + b for a, b in zip(self.row(), other.row(), strict=True)])

    def row(self) -> list[float]:
        """All sums as numbers, for a collective."""
        counts = [self.samples, self.missing, self.encoded_bytes, self.raw_bytes, self.tokens]
        return counts + [self.seconds[stage] for stage in STAGES]

    @classmethod
    def from_row(cls, row: Sequence[float]) -> TeacherSums:
        """The inverse of `row`."""
        samples, missing, encoded_bytes, raw_bytes, tokens, *seconds = row
        return cls(samples, missing, encoded_bytes, dict(zip(STAGES, seconds, strict=True)), raw_bytes, tokens)


def decode_and_pad(
    teacher: str, results: Sequence[KVResult], info: TeacherInfo, plan: KVPlan, slots: int | None, on_missing: str
) -> tuple[BatchKV, TeacherSums]:
    """Decodes a teacher's results, padded to `slots` (None: to the longest), and sums up what it sent.

    Samples without K/V are masked out. The times for decoding and waiting are left at 0.

    Raises:
        TeacherRefusedError: a sample is missing and `on_missing` is `fail`.
        ProtocolError: codes of the codec `pca` are not those that the teacher encoded.
    """
    missing = [result for result in results if isinstance(result, MissingKV)]
    if missing and on_missing == "fail":
        raise TeacherRefusedError(
            teacher,
            f"no K/V for {len(missing)} of {len(results)} samples, the first of them '{missing[0].sample_id}': "
            f"{missing[0].reason}. Set kv.on_missing=mask to train without them",
        )
    present = [result for result in results if isinstance(result, EncodedSampleKV)]
    rows = [row for row, result in enumerate(results) if isinstance(result, EncodedSampleKV)]
    tokens = sum(int(result.token_ids_T.numel()) for result in present)
    sums = TeacherSums(
        len(present),
        len(missing),
        sum(result.nbytes for result in present),
        raw_bytes=tokens * info.layers * info.kv_heads * info.head_dim * 2 * 2,
        tokens=tokens,
    )
    sums.seconds.update(_stage_seconds(present))
    try:
        kv = decode_batch(present) if present else _no_samples(info, plan)
    except ProtocolError as error:
        raise ProtocolError(f"teacher '{teacher}': {error}") from error
    return _padded(kv, rows, len(results), slots), sums


def _stage_seconds(results: Sequence[EncodedSampleKV]) -> dict[str, float]:
    """Seconds by stage at the teacher, and in the network, over the teacher's batches.

    The samples of one of its batches wait together, and report the batch's time in the model and in encoding. So a
    batch counts once, with its slowest sample.
    """
    batches: dict[tuple[float, float], list[Timings]] = {}
    for result in results:
        batches.setdefault((result.timings.prefill, result.timings.encode), []).append(result.timings)
    return {
        stage: sum(max(getattr(timings, stage) for timings in batch) for batch in batches.values())
        for stage in TEACHER_STAGES
    }


def _no_samples(info: TeacherInfo, plan: KVPlan) -> BatchKV:
    """A batch of no samples and one slot: every rank goes through the same steps, even if a teacher sent nothing."""
    heads, head_dim = plan.decoded_shape(info.kv_heads, info.head_dim)
    x_BLHMD = torch.zeros(0, len(plan.layers), heads, 1, head_dim)
    ends_BLHM = torch.zeros(0, 1, 1, 1, dtype=torch.long)
    return BatchKV(x_BLHMD, x_BLHMD, torch.zeros(0, 1, dtype=torch.bool), ends_BLHM)


def _padded(kv: BatchKV, rows: list[int], batch: int, slots: int | None) -> BatchKV:
    """Moves the decoded samples to their rows of the batch, and pads the slots."""
    width = kv.mask_BM.shape[1]
    slots = width if slots is None else slots
    assert width <= slots, "a plan's budget bounds the slots"
    if (len(rows), width) == (batch, slots):
        return kv

    def padded(x: Tensor, slot_dim: int, fill: int = 0) -> Tensor:
        shape = [batch, *x.shape[1:]]
        shape[slot_dim] = slots
        whole = x.new_full(shape, fill)
        whole.narrow(slot_dim, 0, width)[rows] = x
        return whole

    return replace(
        kv.map(lambda x_BLHMD: padded(x_BLHMD, 3)),
        mask_BM=padded(kv.mask_BM, 1),
        byte_ends_BLHM=padded(kv.byte_ends_BLHM, 3, fill=-1),
    )
