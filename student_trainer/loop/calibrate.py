"""Before the first step: fits each teacher's alignment on training samples and measures the targets' scale."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from align.calibration import Calibration, LayerCalibration, StudentRead
from data.records import Record
from kvcore.errors import FieldError, KVDistillError
from kvcore.types import TENSORS, Tensor
from student_trainer.model.distill_model import DistillModel, TrainBatch
from student_trainer.monitoring.phase_progress import watched

logger = logging.getLogger(__name__)

Batcher = Callable[[Sequence[Record]], TrainBatch]


FailTogether = Callable[[KVDistillError | None], None]


@dataclass(frozen=True, slots=True)
class _Samples:
    """This rank's share of the calibration samples, and how their batches are made."""

    records: Sequence[Record]
    numbers: Sequence[int]
    batcher: Batcher
    micro_batch: int

    def batches(self, what: str) -> Iterator[tuple[TrainBatch, Tensor]]:
        """Micro-batches, and the numbers of their samples among all ranks'; `what` they are for is shown."""
        for start in watched(what, range(0, len(self.records), self.micro_batch)):
            chosen = slice(start, start + self.micro_batch)
            yield self.batcher(self.records[chosen]), torch.tensor(self.numbers[chosen])


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

    The samples are read once more where a layer map has to be found before an adapter can be fitted, and once more
    where teachers are fused, so that none of their K/V has to be kept.

    Args:
        records: this rank's share of the calibration samples.
        numbers: each record's number among all ranks' calibration samples.
        batcher: fetches the teachers' K/V for records.
        fail_together: called with this rank's error or None; raises on every rank if any had one.

    Raises:
        FieldError: too few samples to fit on.
    """
    model.eval()
    samples = _Samples(records, numbers, batcher, micro_batch)
    unmapped = {place: LayerCalibration(one) for place, one in enumerate(model.aligners) if one.needs_layer_pass}
    if unmapped:
        _run("finding layers", model, samples, unmapped, fail_together)
    calibrations = {place: Calibration(aligner) for place, aligner in enumerate(model.aligners)}
    _run("fitting alignments", model, samples, calibrations, fail_together)
    if dist.get_rank() == 0:
        for name, aligner in zip(model.weights, model.aligners, strict=True):
            aligner.warn_if_poor(name=name)
    first = model.aligners[0]
    if model.fusion is None:
        model.freeze(first.scale_LK.clone(), first.variance_LK.clone())
    else:
        model.freeze(*_fused_scale(model, samples, fail_together))


def _run(
    what: str,
    model: DistillModel,
    samples: _Samples,
    calibrations: Mapping[int, Calibration | LayerCalibration],
    fail_together: FailTogether,
) -> None:
    """One pass over the samples for the teachers at the given places."""
    failure: KVDistillError | None = None
    try:
        for batch, sample_B in samples.batches(what):
            read = _read(model, batch)
            for place, calibration in calibrations.items():
                calibration.update(batch.teachers[place], sample_B, read)
    except KVDistillError as error:
        failure = error
    fail_together(failure)
    for calibration in calibrations.values():
        for tensor in calibration.tensors():
            dist.all_reduce(tensor)
        calibration.finish()


def _read(model: DistillModel, batch: TrainBatch) -> StudentRead:
    """The student's own K/V over the text that the teachers read."""
    tokens = batch.tokens
    text = model.student.read_text(tokens.text_ids_BT, tokens.text_mask_BT, predict=False)
    return StudentRead(text.k_BLHTD, text.v_BLHTD, tokens.text_byte_ends_BT)


def _fused_scale(model: DistillModel, samples: _Samples, fail_together: FailTogether) -> tuple[Tensor, Tensor]:
    """Standard deviation and variance [L,K] of the fused targets.

    Raises:
        FieldError: no slot of any sample holds a target, or the targets never vary.
    """
    student, device = model.aligners[0].student, model.aligners[0].scale_LK.device
    count = torch.zeros(1, dtype=torch.float64, device=device)
    total_KLF = torch.zeros(len(TENSORS), student.layers, student.features, dtype=torch.float64, device=device)
    square_KLF = torch.zeros_like(total_KLF)
    failure: KVDistillError | None = None
    try:
        for batch, _ in samples.batches("scaling targets"):
            k_BLHMD, v_BLHMD, mask_BM = model.fused(batch)
            rows, slots = mask_BM.nonzero(as_tuple=True)
            count += len(rows)
            for column, x_BLHMD in enumerate((k_BLHMD, v_BLHMD)):
                x_NLF = x_BLHMD[rows, :, :, slots].flatten(2).double()
                total_KLF[column] += x_NLF.sum(dim=0)
                square_KLF[column] += x_NLF.square().sum(dim=0)
    except KVDistillError as error:
        failure = error
    fail_together(failure)
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
