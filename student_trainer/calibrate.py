"""Before the first step: fits each teacher's alignment on training samples and measures the targets' scale."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from align.aligner import Calibration, StudentRead
from align.head_dim_adapter import TENSORS
from data.records import Record
from kvcore.errors import KVDistillError
from kvcore.types import Tensor
from student_trainer.model import DistillModel, TrainBatch

logger = logging.getLogger(__name__)

Batcher = Callable[[Sequence[Record]], TrainBatch]


@torch.no_grad()
def calibrate(
    model: DistillModel,
    records: Sequence[Record],
    numbers: Sequence[int],
    batcher: Batcher,
    micro_batch: int,
    fail_together: Callable[[KVDistillError | None], None],
) -> None:
    """Fits all alignments of `model` in place; every rank ends with the same ones.

    Args:
        records: this rank's share of the calibration samples.
        numbers: each record's number among all ranks' calibration samples.
        batcher: fetches the teachers' K/V for records.
        fail_together: called with this rank's error or None; raises on every rank if any had one.

    Raises:
        FieldError: too few samples to fit on.
    """
    model.eval()
    calibrations = [Calibration(aligner) for aligner in model.aligners]
    kept: list[TrainBatch] = []
    failure: KVDistillError | None = None
    try:
        for start in range(0, len(records), micro_batch):
            batch = batcher(records[start : start + micro_batch])
            if model.fuses:
                kept.append(batch)
            read = _read(model, batch)
            sample_B = torch.tensor(numbers[start : start + micro_batch])
            for calibration, kv in zip(calibrations, batch.teachers, strict=True):
                calibration.update(kv, sample_B, read)
    except KVDistillError as error:
        failure = error
    fail_together(failure)
    for calibration in calibrations:
        for tensor in calibration.tensors():
            dist.all_reduce(tensor)
        calibration.finish()
    if dist.get_rank() == 0:
        for name, aligner in zip(model.weights, model.aligners, strict=True):
            aligner.warn_if_poor(name=name)
    model.freeze(*_fused_scale(model, kept))


def _read(model: DistillModel, batch: TrainBatch) -> StudentRead:
    """The student's own K/V over the text that the teachers read."""
    tokens = batch.tokens
    _, capture = model.student.text_logits(tokens.text_ids_BT, tokens.text_mask_BT)
    k_BLHTD, v_BLHTD = capture.columns(0, tokens.text_ids_BT.shape[1])
    return StudentRead(k_BLHTD, v_BLHTD, tokens.text_byte_ends_BT)


def _fused_scale(model: DistillModel, batches: Sequence[TrainBatch]) -> tuple[Tensor, Tensor]:
    """Standard deviation and variance [L,K] of the fused targets, or of the first teacher's where nothing is fused."""
    first = model.aligners[0]
    if not model.fuses:
        return first.scale_LK.clone(), first.variance_LK.clone()
    layers, features = first.student.layers, first.student.features
    device = first.scale_LK.device
    count = torch.zeros(1, dtype=torch.float64, device=device)
    total_KLF = torch.zeros(len(TENSORS), layers, features, dtype=torch.float64, device=device)
    square_KLF = torch.zeros_like(total_KLF)
    for batch in batches:
        k_BLHMD, v_BLHMD, mask_BM = model.fused(batch.teachers)
        rows, slots = mask_BM.nonzero(as_tuple=True)
        count += len(rows)
        for column, x_BLHMD in enumerate((k_BLHMD, v_BLHMD)):
            x_NLF = x_BLHMD[rows, :, :, slots].flatten(2).double()
            total_KLF[column] += x_NLF.sum(dim=0)
            square_KLF[column] += x_NLF.square().sum(dim=0)
    for tensor in (count, total_KLF, square_KLF):
        dist.all_reduce(tensor)
    mean_KLF = total_KLF / count
    variance_KLF = square_KLF / count - mean_KLF.square()
    deviation_KL = (square_KLF.mean(dim=2) / count - mean_KLF.mean(dim=2).square()).sqrt()
    return deviation_KL.T.contiguous(), variance_KLF.mean(dim=2).T.contiguous()
