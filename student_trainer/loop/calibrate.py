"""Fits each teacher's alignment on training samples before the first step, and measures the targets' scale."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from align.calibration import Calibration, LayerCalibration, StudentRead
from data.records import Record
from kvcore.errors import FieldError
from kvcore.types import TENSORS, Tensor
from student_trainer.loop.rank_failures import FailTogether, shared_failure
from student_trainer.model.distill_model import DistillModel, TrainBatch
from student_trainer.monitoring.phase_progress import show_progress

logger = logging.getLogger(__name__)

Batcher = Callable[[Sequence[Record]], TrainBatch]
# One pass over the calibration samples, by its name in the progress display: batches and their samples' numbers.
_Pass = Callable[[str], Iterator[tuple[TrainBatch, Tensor]]]


@torch.no_grad()
def calibrate(
    model: DistillModel,
    records: Sequence[Record],
    numbers: Sequence[int],
    batcher: Batcher,
    micro_batch: int,
    fail_together: FailTogether,
) -> None:
    """Fits all alignments of `model` in place; every rank ends with the same ones.

    There is one more pass over the samples if a layer map must be found before an adapter can be fitted, and one more
    if teachers are fused. So no K/V has to be kept in memory.

    Args:
        model: changed in place.
        records: this rank's share of the calibration samples.
        numbers: each record's number among all ranks' calibration samples.
        batcher: fetches the teachers' K/V for records.
        micro_batch: samples per batch.
        fail_together: called with this rank's error or None; raises on every rank if any had one.

    Raises:
        FieldError: too few samples to fit on.
    """
    model.eval()

    def batches(what: str) -> Iterator[tuple[TrainBatch, Tensor]]:
        for start in show_progress(what, range(0, len(records), micro_batch)):
            chosen = slice(start, start + micro_batch)
            yield batcher(records[chosen]), torch.tensor(numbers[chosen])

    unmapped = {index: LayerCalibration(one) for index, one in enumerate(model.aligners) if one.needs_layer_pass}
    if unmapped:
        _run("finding layers", model, batches, unmapped, fail_together)
    calibrations = {index: Calibration(aligner) for index, aligner in enumerate(model.aligners)}
    _run("fitting alignments", model, batches, calibrations, fail_together)
    if dist.get_rank() == 0:
        for name, aligner in zip(model.weights, model.aligners, strict=True):
            aligner.warn_if_poor(name=name)
    first = model.aligners[0]
    if model.fusion is None:
        model.freeze(first.scale_LK.clone(), first.variance_LK.clone())
    else:
        model.freeze(*_fused_scale(model, batches, fail_together))


def _run(
    what: str,
    model: DistillModel,
    batches: _Pass,
    calibrations: Mapping[int, Calibration | LayerCalibration],
    fail_together: FailTogether,
) -> None:
    """One pass over the samples. `calibrations`: by the index of their teacher."""
    with shared_failure(fail_together):
        for batch, sample_B in batches(what):
            read = _read(model, batch)
            for index, calibration in calibrations.items():
                calibration.update(batch.teachers[index], sample_B, read)
    for calibration in calibrations.values():
        for tensor in calibration.tensors():
            dist.all_reduce(tensor)
        calibration.finish()


def _read(model: DistillModel, batch: TrainBatch) -> StudentRead:
    """The student's own K/V of the text that the teachers read."""
    tokens = batch.tokens
    text = model.student.read_text(tokens.text_ids_BT, tokens.text_mask_BT, predict=False)
    return StudentRead(text.k_BLHTD, text.v_BLHTD, tokens.text_byte_ends_BT)


def _fused_scale(model: DistillModel, batches: _Pass, fail_together: FailTogether) -> tuple[Tensor, Tensor]:
    """Standard deviation and variance [L,K] of the fused targets.

    Raises:
        FieldError: no sample has a target, or the targets never vary.
    """
    student, device = model.aligners[0].student, model.aligners[0].scale_LK.device
    count = torch.zeros(1, dtype=torch.float64, device=device)
    total_KLF = torch.zeros(len(TENSORS), student.layers, student.features, dtype=torch.float64, device=device)
    square_KLF = torch.zeros_like(total_KLF)
    with shared_failure(fail_together):
        for batch, _ in batches("scaling targets"):
            k_BLHMD, v_BLHMD, mask_BM = model.fused(batch)
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
    if not bool((variance_KLF.mean(dim=2) > 0).all()):
        raise FieldError(
            "align.calibration_samples",
            f"the fused targets of {int(count)} slots never vary in some layer; raise it, or check kv.selection",
        )
    return deviation_KL.T.contiguous(), variance_KLF.mean(dim=2).T.contiguous()
