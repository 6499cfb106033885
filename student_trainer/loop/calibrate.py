"""Fits each teacher's alignment on training samples, and measures the targets' scale."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
import torch.distributed as dist

from align.calibration import Calibration, LayerCalibration, StudentRead
from align.head_dim_adapter import KVGeometry
from data.records import Record
from kvcore.errors import FieldError
from kvcore.types import TENSORS, Tensor
from student_trainer.loop import ds_engine
from student_trainer.loop.rank_failures import FailTogether, shared_failure
from student_trainer.model.distill_model import DistillModel, TrainBatch
from student_trainer.monitoring.phase_progress import show_progress

logger = logging.getLogger(__name__)

# The batches of lists of records, in their order, with the teachers' K/V.
Fetch = Callable[[Iterable[Sequence[Record]]], Iterator[TrainBatch]]

# Between two looks at the explained variance there are at least FEWEST_BETWEEN samples, since a fit takes time.
FEWEST_BETWEEN, MOST_LOOKS = 64, 8


@dataclass(frozen=True, slots=True)
class _Part:
    """The samples of one batch. Those beyond `number_C`, the numbers of the samples that count, only fill it up."""

    records: Sequence[Record]
    number_C: Tensor


@torch.no_grad()
def calibrate(
    model: DistillModel,
    records: Sequence[Record],
    numbers: Sequence[int],
    fetch: Fetch,
    micro_batch: int,
    fail_together: FailTogether,
    settled_within: float = 0.0,
) -> None:
    """Fits all alignments of `model` in place; every rank ends with the same ones.

    There is one more pass over the samples if a layer map must be found before an adapter can be fitted, and one more
    if teachers are fused. A layer map that was found before stays as it is.

    Args:
        model: changed in place.
        records: this rank's share of the calibration samples.
        numbers: each record's number among all ranks' calibration samples.
        fetch: fetches the teachers' K/V.
        micro_batch: samples per batch.
        fail_together: called with this rank's error or None; raises on every rank if any had one.
        settled_within: stop before the last sample if no teacher's mean explained variance of keys or of values changed
            by this much between two looks. Where no map is fitted, the logarithm of the targets' deviation counts.

    Raises:
        FieldError: too few samples to fit on.
    """
    model.eval()
    parts, total = _parts(list(records), numbers, micro_batch, model.aligners[0].scale_LK.device)
    unmapped = {index: LayerCalibration(one) for index, one in enumerate(model.aligners) if one.needs_layer_pass}
    if unmapped:
        with shared_failure(fail_together):
            for batch, numbers_C in _read_all("finding layers", parts, fetch):
                _update(model, batch, numbers_C, unmapped)
        _sum_over_ranks(unmapped)
        for one in unmapped.values():
            one.finish()
    used = _fit(model, parts, total, fetch, fail_together, settled_within)
    if dist.get_rank() == 0:
        for name, aligner in zip(model.weights, model.aligners, strict=True):
            aligner.warn_if_poor(name=name)
    first = model.aligners[0]
    if model.fusion is None:
        model.freeze(first.scale_LK.clone(), first.variance_LK.clone())
    else:
        model.freeze(*_target_scale(model.fused, first.student, used, fetch, fail_together))


@torch.no_grad()
def scale_own_targets(
    model: DistillModel,
    records: Sequence[Record],
    numbers: Sequence[int],
    fetch: Fetch,
    micro_batch: int,
    fail_together: FailTogether,
) -> None:
    """Measures the scale of the targets that the student gives itself; every rank ends with the same.

    The arguments are those of `calibrate`, whose other steps align with a teacher.

    Raises:
        FieldError: too few samples, or targets that never vary.
    """
    model.eval()
    assert model.self_teacher is not None
    parts, _ = _parts(list(records), numbers, micro_batch, next(model.student.parameters()).device)
    model.freeze(*_target_scale(model.own_target, model.self_teacher.geometry, parts, fetch, fail_together))


def _parts(
    records: list[Record], numbers: Sequence[int], micro_batch: int, device: torch.device
) -> tuple[list[_Part], int]:
    """This rank's batches, as many as every other rank's, and the number of samples of all ranks.

    Raises:
        FieldError: on every rank, if one has no sample.
    """
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = len(records)
    dist.all_reduce(counts)
    if not counts.min():
        raise FieldError("align.calibration_samples", f"{int(counts.sum())} samples are too few for all ranks")
    padded = [*records, *(records[:1] * (int(counts.max()) - len(records)))]
    places = range(0, len(padded), micro_batch)
    number_N = torch.tensor(numbers, dtype=torch.int64)
    parts = [_Part(padded[at : at + micro_batch], number_N[at : at + micro_batch]) for at in places]
    return parts, int(counts.sum())


def _fit(
    model: DistillModel,
    parts: Sequence[_Part],
    total: int,
    fetch: Fetch,
    fail_together: FailTogether,
    settled_within: float,
) -> Sequence[_Part]:
    """Fits every adapter, and returns the parts that were used until the explained variance settled."""
    calibrations = {index: Calibration(aligner) for index, aligner in enumerate(model.aligners)}
    at_once = len(parts[0].records) * dist.get_world_size()
    step = math.ceil(max(FEWEST_BETWEEN, total / MOST_LOOKS) / at_once) if settled_within else len(parts)
    used, before, settled = parts[:0], None, False
    with closing(show_progress("fitting alignments", parts)) as shown:
        while len(used) < len(parts) and not settled:
            _forget_on_other_ranks(calibrations)
            section, used = parts[len(used) : len(used) + step], parts[: len(used) + step]
            with shared_failure(fail_together):
                for part, batch in zip(section, fetch([part.records for part in section]), strict=True):
                    next(shown)
                    _update(model, batch, part.number_C, calibrations)
            _sum_over_ranks(calibrations)
            for calibration in calibrations.values():
                calibration.fit()
            found = _measured(model)
            settled = before is not None and len(used) < len(parts) and _settled(before, found, settled_within)
            before = found
    for calibration in calibrations.values():
        calibration.measure_control()
    if settled and dist.get_rank() == 0:
        logger.info("alignment settled after %d of %d samples", len(used) * at_once, total)
    return used


def _forget_on_other_ranks(calibrations: Mapping[int, Calibration]) -> None:
    """Leaves the sums that were added up over ranks on rank 0 alone, so that adding them up again counts them once."""
    if dist.get_rank() > 0:
        for calibration in calibrations.values():
            for tensor in calibration.tensors():
                tensor.zero_()


def _measured(model: DistillModel) -> Tensor:
    """For keys and values of each teacher: mean explained variance, or log of the deviation where nothing is fitted."""
    found: list[float] = []
    for aligner in model.aligners:
        for tensor in TENSORS:
            by_layer = aligner.adapter.explained_variance(tensor) or aligner.scale(tensor).log().tolist()
            found.append(sum(by_layer) / len(by_layer))
    return torch.tensor(found, dtype=torch.float64, device=model.aligners[0].scale_LK.device)


def _settled(before: Tensor, found: Tensor, within: float) -> bool:
    """Whether nothing changed much. Rank 0 decides: ranks may round differently."""
    decision = ((found - before).abs() < within).all().int()
    dist.broadcast(decision, 0)
    return bool(decision)


def _read_all(what: str, parts: Sequence[_Part], fetch: Fetch) -> Iterator[tuple[TrainBatch, Tensor]]:
    """One pass over the parts, by its name in the progress display: batches and the numbers of their samples."""
    for part, batch in zip(show_progress(what, parts), fetch([part.records for part in parts]), strict=True):
        yield batch, part.number_C


def _update(
    model: DistillModel,
    batch: TrainBatch,
    number_C: Tensor,
    calibrations: Mapping[int, Calibration | LayerCalibration],
) -> None:
    """Adds a batch. `calibrations`: by the index of their teacher. The student reads what fills the batch up, too."""
    read, count = _read(model, batch), len(number_C)
    read = StudentRead(read.k_BLHTD[:count], read.v_BLHTD[:count], read.byte_ends_BT[:count])
    if count:
        for index, calibration in calibrations.items():
            calibration.update(batch.teachers[index][:count], number_C, read)


def _sum_over_ranks(calibrations: Mapping[int, Calibration | LayerCalibration]) -> None:
    for calibration in calibrations.values():
        for tensor in calibration.tensors():
            dist.all_reduce(tensor)


def _read(model: DistillModel, batch: TrainBatch) -> StudentRead:
    """The student's own K/V of the text that the teachers read."""
    tokens = batch.tokens
    text = model.student.read_text(tokens.text_ids_BT, tokens.text_mask_BT)
    return StudentRead(text.k_BLHTD, text.v_BLHTD, tokens.text_byte_ends_BT)


def _target_scale(
    target: Callable[[TrainBatch], tuple[Tensor, Tensor, Tensor]],
    student: KVGeometry,
    parts: Sequence[_Part],
    fetch: Fetch,
    fail_together: FailTogether,
) -> tuple[Tensor, Tensor]:
    """Standard deviation and variance [L,K] of targets in the student's space.

    `target`: k_BLHMD, v_BLHMD and mask_BM of a batch.

    Raises:
        FieldError: no sample has a target, or the targets never vary.
    """
    count = torch.zeros(1, dtype=torch.float64, device=ds_engine.device())
    total_KLF = torch.zeros(len(TENSORS), student.layers, student.features, dtype=torch.float64, device=count.device)
    square_KLF = torch.zeros_like(total_KLF)
    with shared_failure(fail_together):
        for batch, number_C in _read_all("scaling targets", parts, fetch):
            k_BLHMD, v_BLHMD, mask_BM = target(batch)
            rows, slots = mask_BM[: len(number_C)].nonzero(as_tuple=True)
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
            f"the targets of {int(count)} slots never vary in some layer; raise it, or check kv.selection",
        )
    return deviation_KL.T.contiguous(), variance_KLF.mean(dim=2).T.contiguous()
